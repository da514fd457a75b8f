"""Stop strings against a search letter by letter."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.errors import InvalidParameter
from brim.text.stop_strings import StopChecker

_LETTERS = st.text("abé", max_size=5)
_STOPS = st.lists(st.text("abé", min_size=1, max_size=5), max_size=4)


def _naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            stop = max(ended, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(deltas=st.lists(_LETTERS, max_size=20), stops=_STOPS, include=st.booleans())
@settings(max_examples=500, deadline=None)
def test_equals_the_naive_search(deltas: list[str], stops: list[str], include: bool) -> None:
    checker = StopChecker(tuple(stops), include)
    shown = [checker.feed(delta) for delta in deltas]
    text, stop = _naive("".join(deltas), stops, include)
    assert checker.matched == stop
    assert "".join(shown) + checker.finish() == text
    assert checker.finish() == ""


@given(deltas=st.lists(_LETTERS, max_size=20), stops=_STOPS)
@settings(deadline=None)
def test_holds_back_no_more_than_needed(deltas: list[str], stops: list[str]) -> None:
    checker = StopChecker(tuple(stops))
    shown = seen = ""
    for delta in deltas:
        seen += delta
        shown += checker.feed(delta)
        if checker.matched:
            break
        held = seen[len(shown) :]
        assert shown + held == seen
        assert not held or any(stop.startswith(held) for stop in stops)
        assert not any(stop.startswith(seen[at:]) for stop in stops for at in range(len(shown)))


def test_nothing_comes_after_a_match() -> None:
    checker = StopChecker(("END",))
    assert checker.feed("a E") == "a "
    assert checker.feed("ND b") == ""
    assert checker.matched == "END"
    assert checker.feed("c") == "" == checker.finish()


def test_no_stop_strings_pass_all_through() -> None:
    checker = StopChecker(())
    assert checker.feed("abc") == "abc"
    assert checker.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="empty"):
        StopChecker(("a", ""))
