"""Paged attention against the reference, and its independence of how the work is cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from brim.kernels.base import AttentionBatch
from brim.kernels.cpu.kernels import CpuKernels
from brim.kernels.torch_ref import TorchKernels

from .helpers import DTYPES, assert_close, attention_case, poisoned, strided

CASES = [
    # query lengths, sequence lengths, heads, kv heads, head_dim, window
    ([1], [1], 4, 1, 256, 0),
    ([1], [700], 4, 1, 256, 0),
    ([1, 1, 1], [17, 300, 64], 8, 2, 64, 0),
    ([1] * 9, list(range(250, 259)), 4, 2, 80, 0),
    ([70], [70], 4, 4, 96, 0),
    ([40, 1, 5], [300, 257, 5], 4, 1, 128, 0),
    ([1, 33], [600, 290], 4, 2, 64, 100),
    ([1], [800], 6, 2, 32, 513),
    ([1, 3], [2000, 20], 3, 1, 16, 0),
]


def _run(kernels: CpuKernels | TorchKernels, q: Tensor, cache: Tensor, batch: AttentionBatch, softcap: float = 0.0) -> Tensor:
    out = poisoned(q.shape[0], q.shape[1], q.dtype, pad=8)
    kernels.attention(q, cache, batch, 0.11, softcap, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(
    kernels: CpuKernels,
    reference: TorchKernels,
    case: tuple[list[int], list[int], int, int, int, int],
    dtype: torch.dtype,
) -> None:
    query_lens, seq_lens, heads, kv_heads, head_dim, window = case
    cache, batch = attention_case(query_lens, seq_lens, kv_heads, head_dim, dtype, window=window)
    q = strided(sum(query_lens), heads * head_dim, dtype, pad=32)
    for softcap in (0.0, 20.0):
        assert_close(_run(kernels, q, cache, batch, softcap), _run(reference, q, cache, batch, softcap))


@pytest.mark.parametrize("block_size", [1, 8, 48])
def test_block_sizes(kernels: CpuKernels, reference: TorchKernels, block_size: int) -> None:
    cache, batch = attention_case([3, 1], [100, 500], 2, 32, torch.float32, block_size=block_size, window=130)
    q = strided(4, 128, torch.float32)
    assert_close(_run(kernels, q, cache, batch), _run(reference, q, cache, batch))


def test_a_long_context_takes_several_waves(kernels: CpuKernels, reference: TorchKernels) -> None:
    cache, batch = attention_case([1, 2], [20000, 17000], 1, 16, torch.float32, block_size=64)
    q = strided(3, 32, torch.float32)
    assert_close(_run(kernels, q, cache, batch), _run(reference, q, cache, batch))


def test_padding_sequences_give_zeros(kernels: CpuKernels) -> None:
    cache, batch = attention_case([1, 1], [40, 30], 2, 32, torch.float32)
    q = strided(2, 128, torch.float32)
    expected = _run(kernels, q, cache, batch)
    batch.seq_lens[1] = 0
    out = _run(kernels, q, cache, batch)
    assert torch.equal(out[0], expected[0])
    assert (out[1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 150])
def test_a_token_does_not_depend_on_chunking_batching_or_threads(threaded: CpuKernels, dtype: torch.dtype, window: int) -> None:
    length, heads, kv_heads, head_dim = 600, 4, 2, 64
    cache, batch = attention_case([length], [length], kv_heads, head_dim, dtype, window=window)
    q = strided(length, heads * head_dim, dtype)
    whole = _run(threaded, q, cache, batch)
    for step in (1, 7, 64, 257):
        for end in range(length, max(0, length - 4 * step), -step):
            first = max(0, end - step)
            part = _run(threaded, q[first:end], cache, _cut(batch, first, end))
            assert torch.equal(part, whole[first:end]), (step, first)
    twice = _two(batch)
    both = _run(threaded, torch.cat([q[-1:], q[-1:]]), cache, twice)
    assert torch.equal(both[0], whole[-1]) and torch.equal(both[1], whole[-1])


def _cut(batch: AttentionBatch, first: int, end: int) -> AttentionBatch:
    starts = torch.tensor([0, end - first], dtype=torch.int32)
    lens = torch.tensor([end], dtype=torch.int32)
    return AttentionBatch(
        batch.block_tables, batch.slot_mapping, starts, lens, 1, end - first, end, batch.block_size, batch.window
    )


def _two(batch: AttentionBatch) -> AttentionBatch:
    tables = batch.block_tables.repeat(2, 1)
    lens = batch.seq_lens.repeat(2)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32)
    return AttentionBatch(tables, batch.slot_mapping, starts, lens, 2, 1, batch.max_seq_len, batch.block_size, batch.window)
