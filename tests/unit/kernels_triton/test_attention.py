"""Attention against the reference, on small shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from brim.kernels.base import AttentionBatch
from brim.kernels.triton.chip import Chip
from brim.kernels.triton.kernels import TritonKernels
from brim.kernels.triton.scratch import KernelLimits, Scratch

from .helpers import AttentionShape, assert_attention, attention_case, kernels_for, padded, rows_of

CASES = [
    AttentionShape([1], [1], 4, 1, 64),
    AttentionShape([1, 1, 1], [17, 300, 64], 8, 2, 64),
    AttentionShape([1, 1], [130, 90], 3, 1, 80, window=50),
    AttentionShape([1], [150], 2, 2, 96, softcap=20.0),
    AttentionShape([1, 1, 1], [40, 0, 70], 2, 1, 32),
    AttentionShape([70], [70], 2, 1, 64),
    AttentionShape([5, 20], [40, 150], 6, 2, 32, softcap=15.0),
    AttentionShape([1, 33, 1], [100, 190, 5], 2, 1, 64, window=60),
    AttentionShape([3, 1], [20, 50], 2, 1, 256, block_size=8),
    AttentionShape([9, 1, 40, 2], [400, 33, 41, 150], 7, 1, 32),
    AttentionShape([2, 3, 2], [120, 90, 2], 4, 4, 64, window=16),
    AttentionShape([33], [700], 1, 1, 32),
]
WAYS = pytest.mark.parametrize("chunks", [True, False], ids=["cut evenly", "by blocks"])


def kernels_of(device: str, case: AttentionShape, *, chunks: bool, max_num_seqs: int = 0) -> TritonKernels:
    """chunks: several new tokens go through chunk attention, as in small steps; else through prefill attention."""
    kernels = kernels_for(device, case, max_num_seqs=max_num_seqs)
    if not chunks:
        kernels._attention = replace(kernels._attention, chunk_cores=0)
    return kernels


@WAYS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(device: str, case: AttentionShape, chunks: bool) -> None:
    assert_attention(kernels_of(device, case, chunks=chunks), case, torch.float32, device)


@pytest.mark.parametrize("cores", [1, 3, 7, 20])
@pytest.mark.parametrize("case", CASES[5:], ids=str)
def test_chunks_cut_otherwise(device: str, case: AttentionShape, cores: int) -> None:
    """Blocks of one and of many parts, several blocks in a part."""
    kernels = kernels_for(device, case)
    scratch = Scratch(kernels.limits, cores, torch.device(device))
    kernels._attention = replace(kernels._attention, chunk_cores=cores, scratch=scratch)
    assert_attention(kernels, case, torch.float32, device)
    assert not scratch.part_arrivals.any()


@WAYS
def test_attention_in_half_precision(device: str, chunks: bool) -> None:
    """The interpreter cannot multiply bfloat16 matrices; the device tests do."""
    case = AttentionShape([1, 9], [70, 80], 4, 2, 64)
    assert_attention(kernels_of(device, case, chunks=chunks), case, torch.float16, device)


@WAYS
@pytest.mark.parametrize("query_lens", [[1, 1], [1, 6]])
def test_padding_changes_nothing(device: str, query_lens: list[int], chunks: bool) -> None:
    case = AttentionShape(query_lens, [40, 90], 4, 2, 32)
    kernels = kernels_of(device, case, chunks=chunks, max_num_seqs=7)
    cache, batch = attention_case(case, torch.float32, device)
    q = rows_of(sum(query_lens), 128, torch.float32, device)
    out, again = torch.empty_like(q), torch.empty_like(q)
    kernels.attention(q, cache, batch, 0.2, 0.0, out)
    kernels.attention(q, cache, padded(batch, 7), 0.2, 0.0, again)
    torch.testing.assert_close(again, out, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "seqs", "longest", "expected"),
    [
        (4, 4, 1, ["decode"]), (512, 1, 512, ["chunk"]), (300, 9, 200, ["decode", "chunk"]), (513, 1, 513, ["prefill"]),
        (640, 300, 2, ["decode", "chunk"]), (640, 300, 40, ["decode", "prefill"]),
    ],
)  # fmt: skip
def test_which_kernel_is_taken(tokens: int, seqs: int, longest: int, expected: list[str]) -> None:
    """By bounds that a start rehearses: a large step of short chunks takes no form that only it would need."""
    names: list[str] = []

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__.removesuffix("_attention_kernel"))

    kernels = TritonKernels("meta", KernelLimits(512, 4, 2, 64, 100), Chip(132, True, True), launch)
    ints = {"dtype": torch.int32, "device": "meta"}
    batch = AttentionBatch(
        torch.empty(seqs, 8, **ints), torch.empty(tokens, device="meta"), torch.empty(seqs + 1, **ints),
        torch.empty(seqs, **ints), seqs, longest, 4096, 16, 0,
    )  # fmt: skip
    q, cache = (torch.empty(*size, dtype=torch.bfloat16, device="meta") for size in ((tokens, 256), (9, 2, 16, 2, 64)))
    kernels.attention(q, cache, batch, 0.1, 0.0, torch.empty_like(q))
    assert names == expected
