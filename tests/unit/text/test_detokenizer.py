"""Streaming text equals decoding at once, never shows half a character, and costs little."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.text.detokenizer import IncrementalDetokenizer
from brim.text.tokenizer import Tokenizer

_KINDS = ["demo", "spm", "byte_level"]


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_deltas_joined_equal_decode(kind: str, skip: bool, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    byte_ids = [238 + byte for byte in range(256)] if kind == "demo" else list(range(3, 259))
    token_ids = st.one_of(st.integers(0, tokenizer.vocab_size + 3), st.sampled_from(byte_ids), st.integers(0, 5))

    @given(ids=st.lists(token_ids, max_size=40))
    @settings(deadline=None, max_examples=300)
    def check(ids: list[int]) -> None:
        stream = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
        deltas = [stream.feed(token_id) for token_id in ids] + [stream.finish()]
        assert "".join(deltas) == tokenizer.decode(ids, skip_special_tokens=skip)

    check()


@pytest.mark.parametrize("kind", _KINDS)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁\ufffd"), max_size=40))
@settings(deadline=None)
def test_no_half_characters(kind: str, request: pytest.FixtureRequest, text: str) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    stream = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    deltas = [stream.feed(token_id) for token_id in tokenizer.encode(text, add_special_tokens=False)]
    assert not any("\ufffd" in delta for delta in deltas)
    assert stream.finish() == ""
    expected = text[1:] if tokenizer.strips_leading_space and text.startswith(" ") else text
    assert "".join(deltas) == expected


def test_a_cut_off_character_is_held_back_then_replaced(demo: Tokenizer) -> None:
    ids = demo.encode("𓀀", add_special_tokens=False)
    assert len(ids) == 4
    stream = IncrementalDetokenizer(demo)
    assert [stream.feed(token_id) for token_id in ids[:3]] == ["", "", ""]
    assert stream.finish() == "\ufffd" * 3 == demo.decode(ids[:3])
    stream = IncrementalDetokenizer(demo)
    assert stream.feed_all([*ids[:2], *demo.encode("x", False)]) == "\ufffd\ufffdx"


def test_first_space_of_a_text_and_of_a_continuation(spm: Tokenizer) -> None:
    ids = spm.encode("the", add_special_tokens=False)
    assert IncrementalDetokenizer(spm).feed_all([1, *ids]) == "the"
    assert IncrementalDetokenizer(spm, is_continuation=True).feed_all(ids) == " the"


def test_cost_for_each_token(demo: Tokenizer) -> None:
    ids = demo.encode("Some ordinary text, with numbers like 42 and words. " * 200)
    stream = IncrementalDetokenizer(demo)
    started = time.perf_counter()
    for token_id in ids:
        stream.feed(token_id)
    assert (time.perf_counter() - started) / len(ids) < 15e-6
