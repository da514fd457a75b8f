"""Step inputs against a token-by-token reference written with plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.memory.kv_layout import KVGroup, KVLayout
from brim.memory.step_memory import StepLimits
from brim.worker.step_inputs import StepArrays, StepInputs, StepShape

LIMITS = StepLimits(max_num_seqs=6, max_num_tokens=96, max_model_len=128)
LAYOUT = KVLayout(
    groups=(KVGroup("full", (1,), 0, 512), KVGroup("sliding", (0, 2), 32, 1024)),
    block_size=16,
    num_kv_heads=1,
    head_dim=8,
    element_bytes=2,
)


@st.composite
def steps(draw: st.DrawFn) -> StepArrays:
    lens = draw(st.lists(st.integers(1, 16), min_size=1, max_size=6))
    starts = [draw(st.integers(0, 128 - n)) for n in lens]
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    tables = tuple(rng.integers(1, 50, (len(lens), 8), dtype=np.int32) for _ in LAYOUT.groups)
    indices = draw(st.lists(st.integers(0, len(lens) - 1), unique=True).map(sorted))
    ids = rng.integers(0, 1000, sum(lens), dtype=np.int64)
    return StepArrays(
        ids, np.array(lens, dtype=np.int32), np.array(starts, dtype=np.int32), tables, np.array(indices, dtype=np.int32)
    )


@settings(max_examples=60, deadline=None)
@given(steps())
def test_fill_matches_a_loop_over_tokens(step: StepArrays) -> None:
    inputs = StepInputs(LIMITS, LAYOUT, torch.device("cpu"))
    batches = inputs.fill(step)
    token = 0
    for s, (length, start) in enumerate(zip(step.query_lens.tolist(), step.start_positions.tolist(), strict=True)):
        assert inputs.query_start[s] == token
        assert inputs.seq_lens[s] == start + length
        for position in range(start, start + length):
            assert inputs.ids[token] == step.token_ids[token]
            assert inputs.positions[token] == position
            for batch, table in zip(batches, step.block_tables, strict=True):
                assert batch.slot_mapping[token] == table[s, position // 16] * 16 + position % 16
                assert np.array_equal(batch.block_tables[s].numpy(), table[s])
            token += 1
    assert inputs.query_start[len(step.query_lens)] == token
    last = np.cumsum(step.query_lens)[step.sample_indices] - 1
    assert inputs.sample_rows[: len(last)].tolist() == last.tolist()
    assert [b.window for b in batches] == [0, 32]
    assert batches[0].max_query_len == step.query_lens.max()


def test_padding_has_ids_and_rows_that_there_are() -> None:
    """Whatever earlier steps left: ids that the device fills in are -1 on the host, sampled rows lay further on."""
    inputs = StepInputs(LIMITS, LAYOUT, torch.device("cpu"))

    def decode(num_seqs: int) -> StepArrays:
        tables = tuple(np.ones((num_seqs, 1), dtype=np.int32) for _ in LAYOUT.groups)
        ones, zeros = np.ones(num_seqs, dtype=np.int32), np.zeros(num_seqs, dtype=np.int32)
        return StepArrays(np.full(num_seqs, -1, dtype=np.int64), ones, zeros, tables, np.arange(num_seqs, dtype=np.int32))

    for _ in range(3):
        inputs.fill(decode(6))
    inputs.fill(decode(2), StepShape(6, 6, 1, 128))
    assert inputs.ids[:6].tolist() == [-1, -1, 0, 0, 0, 0]
    inputs.fill(decode(6))
    inputs.fill(decode(2))
    assert inputs.sample_rows.tolist() == [0, 1, 0, 0, 0, 0], "padding rows of the last layer"


def test_bytes_are_known_before_building() -> None:
    assert StepInputs.bytes_for(LIMITS, len(LAYOUT.groups), 16) == StepInputs(LIMITS, LAYOUT, torch.device("cpu")).num_bytes


def test_a_step_over_the_limits_is_refused_by_the_buffers() -> None:
    step = StepArrays(
        np.zeros(97, dtype=np.int64),
        np.array([97], dtype=np.int32),
        np.zeros(1, dtype=np.int32),
        tuple(np.zeros((1, 8), dtype=np.int32) for _ in LAYOUT.groups),
        np.zeros(1, dtype=np.int32),
    )
    with pytest.raises(ValueError, match="broadcast"):
        StepInputs(LIMITS, LAYOUT, torch.device("cpu")).fill(step)
