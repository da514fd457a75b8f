from __future__ import annotations

import numpy as np
import pytest

from brim.engine.sampling_params import SamplingParams
from brim.engine.sequence import NO_ROW, Sequence
from brim.engine.sequence_table import SequenceTable


def sequence(prompt: list[int], total: int = 1000, **params: object) -> Sequence:
    return Sequence("a", prompt, SamplingParams(**params), max_total_tokens=total, eos_token_ids=(3,), num_groups=2, seed=9)


def test_buffer_grows_and_keeps_ids() -> None:
    seq = sequence([5, 6], total=2000)
    for token in range(1500):
        seq.append_token(token)
    assert seq.token_ids[: seq.num_tokens].tolist() == [5, 6, *range(1500)]
    assert seq.num_output_tokens == 1500 and seq.last_token == 1499
    assert len(seq.token_ids) <= 2000 and seq.output_ids.tolist() == list(range(1500))


def test_stop_ids_follow_ignore_eos() -> None:
    assert sequence([1], stop_token_ids=(7,)).stop_ids == {3, 7}
    assert sequence([1], stop_token_ids=(7,), ignore_eos=True).stop_ids == {7}


@pytest.mark.parametrize(
    ("params", "special"),
    [
        ({}, False),
        ({"logprobs": 0}, True),
        ({"logit_bias": {1: 2.0}}, True),
        ({"presence_penalty": 1.0}, True),
        ({"min_tokens": 1}, True),
    ],
)
def test_special_rows(params: dict[str, object], special: bool) -> None:
    seq = sequence([1], **params)
    assert seq.is_special is special and seq.may_be_special is special


def test_min_tokens_are_special_only_until_reached() -> None:
    seq = sequence([1], min_tokens=1)
    assert seq.needs_host_tokens
    seq.append_token(4)
    assert not seq.is_special and not seq.needs_host_tokens


def test_table_writes_a_row_and_takes_it_back(make_layout: object) -> None:
    table = SequenceTable(2, 30, make_layout((0, 6)))  # type: ignore[operator]
    seq = sequence([1, 2], temperature=0.5, top_k=-1, top_p=0.9, min_p=0.1)
    row = table.take_row(seq)
    assert row == seq.row == 0 and table.num_free_rows == 1
    assert table.block_tables[0].shape == (2, 8) and table.block_tables[0].dtype == np.int32
    assert (table.temperature[0], table.top_k[0], table.seed[0]) == (np.float32(0.5), 0, 9)
    assert (table.last_token[0], table.num_tokens[0]) == (2, 2)
    seq.row = NO_ROW
    table.release_row(row)
    greedy = sequence([1], temperature=1e-7)
    table.take_row(greedy)
    assert table.temperature[greedy.row] == 0.0
    with pytest.raises(AssertionError):
        table.take_row(greedy)


def test_table_bytes_are_exact(make_layout: object) -> None:
    table = SequenceTable(8, 64, make_layout((0, 6)))  # type: ignore[operator]
    assert table.num_bytes == 2 * 8 * 16 * 4 + 8 * (4 + 4 + 4 + 4 + 8 + 8 + 8 + 1)
