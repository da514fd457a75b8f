"""Ranks agree on the least, and a rank that fails or goes tells or shows the others why."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.errors import EngineError, OutOfDeviceMemory, RankFailed
from brim.parallel.ranks import OneRank, Ranks
from brim.parallel.thread_ranks import ThreadMeeting


def together(size: int, body: Callable[[Ranks], Any], timeout_s: float = 20.0) -> list[Any]:
    """What `body` returns or raises on each rank; a rank whose body ends leaves."""
    meeting = ThreadMeeting(size, timeout_s)

    def run(ranks: Ranks) -> Any:
        try:
            return body(ranks)
        except EngineError as error:
            return error
        finally:
            ranks.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, meeting.ranks))


VALUES = st.integers(-(2**62), 2**62)
ROWS = st.integers(1, 5).flatmap(lambda width: st.lists(st.lists(VALUES, min_size=width, max_size=width), min_size=2, max_size=4))


@settings(max_examples=30, deadline=None)
@given(ROWS)
def test_all_get_the_least_of_each_value(rows: list[list[int]]) -> None:
    least = tuple(min(column) for column in zip(*rows, strict=True))
    assert together(len(rows), lambda ranks: ranks.minimum("blocks", rows[ranks.index])) == [least] * len(rows)


def test_one_rank_agrees_with_itself() -> None:
    ranks = OneRank()
    assert ranks.minimum("blocks", [3, 5]) == (3, 5) and ranks.least("mode", "FULL", ("NONE", "FULL")) == "FULL"
    ranks.fail("loading", ValueError("nobody hears it"))


def test_the_choice_that_stands_first_is_taken() -> None:
    choices, ordered = ("FULL", "PIECEWISE", "FULL"), ("NONE", "PIECEWISE", "FULL")
    assert together(3, lambda ranks: ranks.least("mode", choices[ranks.index], ordered)) == ["PIECEWISE"] * 3


def test_a_rank_that_fails_tells_the_others_why() -> None:
    def body(ranks: Ranks) -> str:
        if ranks.index == 1:
            ranks.fail("the phase load", OutOfDeviceMemory("2 GiB asked for, 1 GiB free."))
            return "left"
        ranks.minimum("the KV blocks", [5])
        return "went on"

    first, second, third = together(3, body)
    said = "Rank 1 failed in the phase load: OutOfDeviceMemory: 2 GiB asked for, 1 GiB free."
    assert second == "left" and str(first) == str(third) == said and isinstance(first, RankFailed)


def test_two_that_fail_at_once_are_both_named() -> None:
    def body(ranks: Ranks) -> None:
        if ranks.index:
            ranks.fail("the phase warm", ValueError(f"reason {ranks.index}"))
        else:
            ranks.minimum("x", [1])

    assert str(together(3, body)[0]) == (
        "Rank 1 failed in the phase warm: ValueError: reason 1. Rank 2 failed in the phase warm: ValueError: reason 2."
    )


def test_whoever_follows_a_failure_says_nothing_of_its_own() -> None:
    def body(ranks: Ranks) -> str:
        if ranks.index == 0:
            ranks.fail("the phase load", ValueError("first"))
            return "left"
        try:
            ranks.minimum("x", [1])
        except RankFailed as error:
            ranks.fail("the phase load", error)  # would wait for ever if it exchanged anything
            return "followed"
        return "went on"

    assert together(2, body, timeout_s=600) == ["left", "followed"]


def test_a_rank_that_leaves_without_a_word_is_named_at_once() -> None:
    found = together(3, lambda ranks: None if ranks.index == 2 else ranks.minimum("x", [1]), timeout_s=600)
    assert "Rank 2 is gone" in str(found[0]) and "rank 1 cannot go on" in str(found[1])


def test_ranks_that_agree_on_different_things_are_a_bug() -> None:
    found = together(2, lambda ranks: ranks.minimum(f"thing {ranks.index}", [1]))
    assert all("do not agree on what" in str(error) and not isinstance(error, RankFailed) for error in found)


def test_many_rounds_in_any_order_of_arrival() -> None:
    def body(ranks: Ranks) -> list[int]:
        return [ranks.minimum("x", [ranks.index + number])[0] for number in range(200)]

    assert together(4, body) == [list(range(200))] * 4


@pytest.mark.parametrize("size", [2, 4])
def test_late_words_are_still_heard(size: int) -> None:
    """A rank that spoke and left is not missed in the round it spoke in."""

    def body(ranks: Ranks) -> tuple[int, ...]:
        return ranks.minimum("x", [ranks.index])

    assert together(size, body) == [(0,)] * size
