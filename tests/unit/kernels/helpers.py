"""Inputs and comparisons the kernel tests share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from brim.kernels.base import AttentionBatch
from brim.kernels.dequantize import BLOCK_TYPES, row_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def strided(rows: int, cols: int, dtype: torch.dtype, pad: int = 0) -> Tensor:
    """Random [rows, cols] whose rows lie cols + pad apart."""
    return torch.randn(rows, cols + pad).to(dtype)[:, :cols]


def poisoned(rows: int, cols: int, dtype: torch.dtype, pad: int = 0) -> Tensor:
    """[rows, cols] of NaN: whatever a kernel leaves unwritten shows."""
    return torch.full((rows, cols + pad), float("nan"), dtype=dtype)[:, :cols]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Equal within the dtype's tolerance, relative to the largest magnitude about."""
    assert not actual.isnan().any(), "an element was not written"
    limit = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    error = (actual.float() - expected.float()).abs().max().item() if actual.numel() else 0.0
    scale = max(1.0, expected.float().abs().max().item()) if actual.numel() else 1.0
    assert error <= limit * scale, f"error {error:.3g} at scale {scale:.3g}"


def attention_case(
    query_lens: list[int],
    seq_lens: list[int],
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    block_size: int = 16,
    window: int = 0,
) -> tuple[Tensor, AttentionBatch]:
    """A cache with layers and blocks scattered as in the engine, and the batch. What may not be read is NaN."""
    layers, seqs = 3, len(seq_lens)
    per_seq = [-(-length // block_size) for length in seq_lens]
    total = sum(per_seq) + 2
    pool = torch.full((total, layers, 2, block_size, kv_heads, head_dim), float("nan"), dtype=dtype)
    cache = pool[:, 1]
    order = torch.randperm(total)
    tables = torch.full((seqs, max(per_seq, default=0) + 1), 2**30, dtype=torch.int32)
    slots: list[int] = []
    used = 0
    for seq, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        blocks = order[used : used + per_seq[seq]]
        used += per_seq[seq]
        oldest = max(0, seq_len - query_len - window + 1) if window else 0
        for position in range(seq_len):
            block, offset = int(blocks[position // block_size]), position % block_size
            if position >= oldest:
                cache[block, :, offset] = torch.randn(2, kv_heads, head_dim).to(dtype)
            if position >= seq_len - query_len:
                slots.append(block * block_size + offset)
        first = oldest // block_size
        tables[seq, first : per_seq[seq]] = blocks[first:].int()
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32)
    batch = AttentionBatch(
        block_tables=tables,
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        query_start=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_seqs=seqs,
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        block_size=block_size,
        window=window,
    )
    return cache, batch


def random_blocks(ggml_type: int, rows: int, cols: int) -> np.ndarray:  # type: ignore[type-arg]
    """Random bytes, with the scales kept finite: every bit pattern of the values occurs."""
    name = BLOCK_TYPES[ggml_type].name
    if name in ("F32", "F16", "BF16"):
        values = torch.randn(rows, cols).to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name])
        return values.view(torch.uint8).numpy().reshape(rows, -1)
    raw = np.random.default_rng(0).integers(0, 256, (rows, row_bytes(ggml_type, cols)), dtype=np.uint8)
    blocks = raw.reshape(-1, BLOCK_TYPES[ggml_type].block_bytes)
    halves = [208] if name == "Q6_K" else [0, 2] if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else [0]
    for first in halves:
        blocks[:, first + 1] = blocks[:, first + 1] & 0x83 | 0x20  # exponents near one
    return raw
