"""Inputs and comparisons, on any device and fast enough for long sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from brim.kernels.base import AttentionBatch, SamplingBatch
from brim.kernels.torch_ref import TorchKernels
from brim.kernels.triton.kernels import TritonKernels
from brim.kernels.triton.scratch import KernelLimits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class AttentionShape:
    """Query and sequence lengths, and what a model fixes."""

    query_lens: list[int]
    seq_lens: list[int]
    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0
    block_size: int = 16
    softcap: float = 0.0


def kernels_for(device: str, shape: AttentionShape, vocab_size: int = 1000, max_num_seqs: int = 0) -> TritonKernels:
    """Triton kernels sized for one case."""
    seqs = max(max_num_seqs, len(shape.seq_lens))
    return TritonKernels(device, KernelLimits(seqs, shape.heads, shape.kv_heads, shape.head_dim, vocab_size))


def rows_of(rows: int, cols: int, dtype: torch.dtype, device: str, pad: int = 0, fill: float | None = None) -> Tensor:
    """[rows, cols] whose rows lie cols + pad apart: random, or all `fill` (NaN shows what a kernel leaves unwritten)."""
    if fill is not None:
        return torch.full((rows, cols + pad), fill, dtype=dtype, device=device)[:, :cols]
    return torch.randn(rows, cols + pad, device=device).to(dtype)[:, :cols]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Equal within the dtype's tolerance, relative to the largest magnitude about."""
    assert not actual.isnan().any(), "an element was not written"
    limit = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    error = (actual.float() - expected.float()).abs().max().item() if actual.numel() else 0.0
    scale = max(1.0, expected.float().abs().max().item()) if actual.numel() else 1.0
    assert error <= limit * scale, f"error {error:.3g} at scale {scale:.3g}"


def attention_case(shape: AttentionShape, dtype: torch.dtype, device: str) -> tuple[Tensor, AttentionBatch]:
    """A cache with layers and blocks scattered as in the engine, and the batch. What may not be read is NaN or out of range."""
    size, seqs = shape.block_size, len(shape.seq_lens)
    per_seq = [-(-length // size) for length in shape.seq_lens]
    total = sum(per_seq) + 2
    pool = torch.full((total, 3, 2, size, shape.kv_heads, shape.head_dim), float("nan"), dtype=dtype, device=device)
    cache = pool[:, 1]
    order = torch.randperm(total).to(device)
    tables = torch.full((seqs, max(per_seq, default=0) + 1), 2**30, dtype=torch.int32, device=device)
    slots, used = [], 0
    for seq, (query_len, seq_len) in enumerate(zip(shape.query_lens, shape.seq_lens, strict=True)):
        blocks = order[used : used + per_seq[seq]]
        used += per_seq[seq]
        oldest = max(0, seq_len - query_len - shape.window + 1) if shape.window else 0
        positions = torch.arange(oldest, seq_len, device=device)
        owner, offset = blocks[positions // size], positions % size
        for part in (0, 1):
            cache[owner, part, offset] = torch.randn(len(positions), shape.kv_heads, shape.head_dim, device=device).to(dtype)
        slots.append((owner * size + offset)[-query_len:] if seq_len else owner[:0])
        tables[seq, oldest // size : per_seq[seq]] = blocks[oldest // size :].int()
    starts = torch.tensor([0, *torch.tensor(shape.query_lens).cumsum(0).tolist()], dtype=torch.int32, device=device)
    lens = torch.tensor(shape.seq_lens, dtype=torch.int32, device=device)
    batch = AttentionBatch(
        tables, torch.cat(slots), starts, lens, seqs, max(shape.query_lens), max(shape.seq_lens), size, shape.window
    )
    return cache, batch


def assert_attention(kernels: TritonKernels, shape: AttentionShape, dtype: torch.dtype, device: str) -> None:
    """Attention of one case against the reference in float32, twice: scratch memory must be left as it was found."""
    cache, batch = attention_case(shape, dtype, device)
    q = rows_of(sum(shape.query_lens), shape.heads * shape.head_dim, dtype, device, pad=32)
    expected = rows_of(*q.shape, torch.float32, device, fill=float("nan"))
    scale = shape.head_dim**-0.5
    TorchKernels(device).attention(q.float(), cache.float(), batch, scale, shape.softcap, expected)
    for _ in range(2):
        out = rows_of(*q.shape, dtype, device, pad=8, fill=float("nan"))
        kernels.attention(q, cache, batch, scale, shape.softcap, out)
        assert_close(out, expected)


def padded(batch: AttentionBatch, seqs: int) -> AttentionBatch:
    """The same batch with room for more sequences: those are of length 0 and own no tokens."""
    extra = seqs - batch.num_seqs
    tail = batch.query_start[-1:].expand(extra)
    return replace(
        batch,
        block_tables=torch.cat([batch.block_tables, torch.full_like(batch.block_tables[:1], 2**30).expand(extra, -1)]),
        query_start=torch.cat([batch.query_start, tail]),
        seq_lens=torch.cat([batch.seq_lens, batch.seq_lens.new_zeros(extra)]),
        num_seqs=seqs,
    )


def sampling_batch(rows: int, device: str, *, greedy: bool = False, truncated: bool = True) -> SamplingBatch:
    """Every kind of row: greedy ones, and all subsets of top_k, top_p, min_p."""
    kinds = torch.arange(rows)
    off = torch.zeros(rows, dtype=torch.bool) if truncated else torch.ones(rows, dtype=torch.bool)
    parts = (
        torch.where((kinds % 5 == 0) & truncated, 0.0, 0.2 + torch.rand(rows)),
        torch.where((kinds % 3 == 0) | off, 0, torch.randint(1, 50, (rows,))).int(),
        torch.where((kinds % 2 == 0) | off, 1.0, 0.3 + 0.69 * torch.rand(rows)),
        torch.where((kinds % 4 == 0) & ~off, 0.1 * torch.rand(rows), 0.0),
        torch.randint(-(2**62), 2**62, (rows,)),
        torch.randint(0, 10000, (rows,)),
    )
    return SamplingBatch(*(part.to(device) for part in parts), all_greedy=greedy)


def assert_same_samples(kernels: TritonKernels, logits: Tensor, batch: SamplingBatch) -> None:
    """The reference's ids, but for rows whose uniform number falls on the border of two ids within rounding."""
    rows = logits.shape[0]
    expected, out = (torch.full((rows,), -1, device=logits.device) for _ in range(2))
    kept = logits.clone()
    TorchKernels(logits.device).sample(logits, batch, expected)
    kernels.sample(logits, batch, out)
    assert torch.equal(logits, kept)
    differing = (expected != out).nonzero().flatten().tolist()
    for row in differing:
        low, high = sorted((int(out[row]), int(expected[row])))
        temperature = batch.temperature[row].double()
        between = logits[row, low + 1 : high].double() / temperature
        assert (between - logits[row].double().max() / temperature).exp().sum() < 1e-3, "not a matter of rounding"
    assert len(differing) <= max(1, rows // 20)
