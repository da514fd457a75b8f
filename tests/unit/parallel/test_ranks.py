"""Ranks agree on the least, and a rank that fails or goes tells or shows the others why: as threads, and over gloo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.errors import EngineError, OutOfDeviceMemory, RankFailed
from brim.parallel.gloo_ranks import GlooRanks, RankStore
from brim.parallel.ranks import OneRank, Ranks
from brim.parallel.thread_ranks import ThreadMeeting

Body = Callable[[Ranks], Any]
Together = Callable[..., list[Any]]


def run_all(makers: Sequence[Callable[[], Ranks]], body: Body) -> list[Any]:
    """What `body` returns or raises on each rank; a rank whose body ends leaves."""

    def run(make: Callable[[], Ranks]) -> Any:
        try:
            ranks = make()
            try:
                return body(ranks)
            finally:
                ranks.close()
        except EngineError as error:
            return error

    with ThreadPoolExecutor(len(makers)) as pool:
        return list(pool.map(run, makers))


def as_threads(size: int, body: Body, timeout_s: float = 20.0) -> list[Any]:
    """Ranks that meet in memory."""
    meeting = ThreadMeeting(size, timeout_s)
    return run_all([lambda ranks=ranks: ranks for ranks in meeting.ranks], body)  # type: ignore[misc]


def over_gloo(size: int, body: Body, timeout_s: float = 20.0) -> list[Any]:
    """Ranks that meet over gloo; threads here, processes in tests/e2e."""
    store = RankStore()

    def make(index: int) -> Ranks:
        return GlooRanks(index, size, port=store.port, timeout_s=timeout_s)

    return run_all([lambda index=index: make(index) for index in range(size)], body)  # type: ignore[misc]


@pytest.fixture(params=[as_threads, over_gloo])
def together(request: pytest.FixtureRequest) -> Together:
    return request.param  # type: ignore[no-any-return]


VALUES = st.integers(-(2**62), 2**62)
ROWS = st.integers(1, 5).flatmap(lambda width: st.lists(st.lists(VALUES, min_size=width, max_size=width), min_size=2, max_size=4))


@settings(max_examples=30, deadline=None)
@given(ROWS)
def test_all_get_the_least_of_each_value(rows: list[list[int]]) -> None:
    least = tuple(min(column) for column in zip(*rows, strict=True))
    assert as_threads(len(rows), lambda ranks: ranks.minimum("blocks", rows[ranks.index])) == [least] * len(rows)


@settings(max_examples=5, deadline=None)
@given(ROWS)
def test_gloo_carries_any_figure(rows: list[list[int]]) -> None:
    least = tuple(min(column) for column in zip(*rows, strict=True))
    assert over_gloo(len(rows), lambda ranks: ranks.minimum("blocks", rows[ranks.index])) == [least] * len(rows)


def test_one_rank_agrees_with_itself() -> None:
    ranks = OneRank()
    assert ranks.minimum("blocks", [3, 5]) == (3, 5)
    ranks.heed()
    ranks.fail("loading", ValueError("nobody hears it"))
    ranks.close()


def test_a_rank_that_fails_tells_the_others_why(together: Together) -> None:
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

    assert str(as_threads(3, body)[0]) == (
        "Rank 1 failed in the phase warm: ValueError: reason 1. Rank 2 failed in the phase warm: ValueError: reason 2."
    )


def test_a_reason_reaches_who_comes_when_all_others_have_left() -> None:
    """Rank 1 fails, rank 0 follows, and only then does rank 2 come to the exchange."""
    followers = ThreadMeeting(2)

    def body(ranks: Ranks) -> str:
        if ranks.index == 1:
            ranks.fail("the phase load", ValueError("scripted"))
            return "left"
        if ranks.index == 2:
            followers.ranks[1].minimum("rank 0 has left", [0])
            ranks.minimum("x", [1])
            return "went on"
        try:
            ranks.minimum("x", [1])
        except RankFailed as error:
            ranks.fail("the phase load", error)
            followers.ranks[0].minimum("rank 0 has left", [0])
            return "followed"
        return "went on"

    first, second, third = over_gloo(3, body)
    assert (first, second, str(third)) == ("followed", "left", "Rank 1 failed in the phase load: ValueError: scripted.")


def test_a_rank_that_leaves_without_a_word_is_named(together: Together) -> None:
    found = together(3, lambda ranks: None if ranks.index == 2 else ranks.minimum("x", [1]), timeout_s=600)
    assert [str(error) for error in found[:2]] == ["Rank 2 is gone: no word was left."] * 2


def test_ranks_that_never_answer_are_named_after_the_timeout(together: Together) -> None:
    ended = ThreadMeeting(4)

    def body(ranks: Ranks) -> Any:
        try:
            return ranks.minimum("x", [1]) if ranks.index < 2 else None
        finally:
            ended.ranks[ranks.index].minimum("all others have given up", [0])

    found = together(4, body, timeout_s=0.5)
    assert [str(error) for error in found[:2]] == ["Ranks 2, 3 did not answer within 0.5 s."] * 2


def test_ranks_that_agree_on_different_things_are_a_bug(together: Together) -> None:
    found = together(2, lambda ranks: ranks.minimum(f"thing {ranks.index}", [1]))
    assert all("do not agree on what" in str(error) and not isinstance(error, RankFailed) for error in found)


def test_many_rounds_in_any_order_of_arrival(together: Together) -> None:
    def body(ranks: Ranks) -> list[int]:
        return [ranks.minimum("x", [ranks.index + number])[0] for number in range(100)]

    assert together(4, body) == [list(range(100))] * 4


@pytest.mark.parametrize("size", [2, 4])
def test_late_words_are_still_heard(together: Together, size: int) -> None:
    """A rank that spoke and left is not missed in the round it spoke in."""
    assert together(size, lambda ranks: ranks.minimum("x", [ranks.index])) == [(0,)] * size


def test_between_exchanges_a_failure_is_heard_as_well() -> None:
    """Over gloo: a rank that loads for minutes need not load to the end."""
    failed = ThreadMeeting(2)

    def body(ranks: Ranks) -> str:
        ranks.heed()
        ranks.minimum("nobody has failed yet", [0])
        if ranks.index == 1:
            ranks.fail("the phase load", ValueError("scripted"))
        failed.ranks[ranks.index].minimum("rank 1 has failed", [0])
        if ranks.index == 0:
            ranks.heed()
        return "went on"

    assert [str(end) for end in over_gloo(2, body)] == ["Rank 1 failed in the phase load: ValueError: scripted.", "went on"]


def test_ranks_that_do_not_come_are_named() -> None:
    store = RankStore()
    makers = [lambda index=index: GlooRanks(index, 4, port=store.port, meet_s=1.0) for index in (0, 2)]  # type: ignore[misc]
    where = f"4 ranks did not come together at 127.0.0.1:{store.port}."
    found = run_all(makers, lambda ranks: None)
    assert [str(error) for error in found] == [f"{where} Ranks 1, 3 did not answer within 1 s."] * 2


def test_where_nobody_launched_the_ranks_is_said() -> None:
    store = RankStore()
    port = store.port
    del store
    with pytest.raises(RankFailed, match=f"Nothing answers at 127.0.0.1:{port}, where the ranks meet"):
        GlooRanks(0, 2, port=port, meet_s=1.0)
