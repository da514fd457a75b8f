"""Attention against the reference, on small shapes."""

from __future__ import annotations

import pytest
import torch

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
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(device: str, case: AttentionShape) -> None:
    assert_attention(kernels_for(device, case), case, torch.float32, device)


def test_attention_in_half_precision(device: str) -> None:
    """The interpreter cannot multiply bfloat16 matrices; the device tests do."""
    case = AttentionShape([1, 9], [70, 80], 4, 2, 64)
    assert_attention(kernels_for(device, case), case, torch.float16, device)


@pytest.mark.parametrize("query_lens", [[1, 1], [1, 6]])
def test_padding_changes_nothing(device: str, query_lens: list[int]) -> None:
    case = AttentionShape(query_lens, [40, 90], 4, 2, 32)
    kernels = kernels_for(device, case, max_num_seqs=7)
    cache, batch = attention_case(case, torch.float32, device)
    q = rows_of(sum(query_lens), 128, torch.float32, device)
    out, again = torch.empty_like(q), torch.empty_like(q)
    kernels.attention(q, cache, batch, 0.2, 0.0, out)
    kernels.attention(q, cache, padded(batch, 7), 0.2, 0.0, again)
    torch.testing.assert_close(again, out, atol=1e-6, rtol=1e-5)
