"""Conformance checks of arithmetic: copies, the declared dtypes, and the chosen kernels against the reference on tiny cases."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from brim.kernels.base import AttentionBatch, SamplingBatch
from brim.kernels.torch_ref import TorchKernels
from brim.units import MIB
from brim.worker.check_bench import TINY_LIMITS, Bench, CheckFailed, Figures, Found

# The most that results may differ from float32 on the host, relative to the largest magnitude about; fast float32 products of
# accelerators round their inputs to 10 bits.
_TOLERANCE = {"float32": 2e-3, "bfloat16": 2e-2, "float16": 4e-3}
_COARSE = 0.1  # of a dtype not listed
_SIZE = 64
_BLOCK = 16
_SEQ_LENS, _QUERY_LENS = (37, 5), (6, 1)
Batch = TypeVar("Batch", AttentionBatch, SamplingBatch)


def copies(bench: Bench) -> Found:
    """Bytes go to the device and come back as they were, strided ones too."""
    generator = torch.Generator().manual_seed(1)
    sent = torch.randint(0, 256, (4 * MIB,), dtype=torch.uint8, generator=generator)
    there = sent.to(bench.device, copy=True)
    again = there.clone()
    bench.platform.synchronize()
    if not torch.equal(again.cpu(), sent):
        raise CheckFailed("4 MiB that went to the device came back changed")
    square = sent[: 1 << 20].view(1024, 1024)
    if not torch.equal(there[: 1 << 20].view(1024, 1024)[:, ::3].cpu(), square[:, ::3]):
        raise CheckFailed("a strided copy from the device is wrong")
    return Found({"copied_bytes": sent.numel()})


def dtypes(bench: Bench) -> Found:
    """A small product in each declared dtype against float32 on the host."""
    figures: Figures = {}
    wrong = []
    for name in bench.platform.capabilities.dtypes:
        dtype = getattr(torch, name)
        a, b = (_random(seed, _SIZE, _SIZE).to(dtype) for seed in (1, 2))
        try:
            product = a.to(bench.device) @ b.to(bench.device)
            bench.platform.synchronize()
        except RuntimeError as error:
            if bench.platform.as_brim_error(error) is not None:
                raise
            wrong.append(f"{name} does not compute: {str(error).splitlines()[0][:120]}")
            continue
        off = _difference(product, a.float() @ b.float())
        figures[f"{name}_difference"] = off
        if not off <= _TOLERANCE.get(name, _COARSE):
            wrong.append(f"{name} products differ by {off:.2g}")
    if wrong:
        raise CheckFailed("; ".join(wrong), figures)
    return Found(figures)


def kernels(bench: Bench) -> Found:
    """Which kernels start-up chooses, and why not faster ones."""
    selection = bench.selection
    figures: Figures = {"kernels": selection.kernels.name, "scratch_bytes": selection.kernels.scratch_bytes}
    if selection.kernels.byte_products:
        figures["products_of_bytes"] = selection.kernels.byte_products
    return Found(figures, selection.fallback_reason or "The fastest there is for this device.")


def norm_case(bench: Bench, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """x [5, 64] and weight [64] on the device, and the norm of it in float32 on the host."""
    x, weight = _random(3, 5, _SIZE).to(getattr(torch, name)), 1 + 0.1 * _random(4, _SIZE)
    expected = torch.empty(5, _SIZE)
    TorchKernels("cpu").rms_norm(x.float(), weight, 1e-6, expected)
    return x.to(bench.device), weight.to(bench.device), expected


def kernel_rms_norm(bench: Bench) -> Found:
    """rms_norm in each dtype."""
    figures: Figures = {}
    for name in bench.platform.capabilities.dtypes:
        x, weight, expected = norm_case(bench, name)
        out = torch.empty_like(x)
        bench.selection.kernels.rms_norm(x, weight, 1e-6, out)
        _require_close(bench, out, expected, name, "rms_norm", figures)
    return Found(figures)


def kernel_linear(bench: Bench) -> Found:
    """A matrix filled by rows, times a few tokens, in each dtype."""
    figures: Figures = {}
    for name in bench.platform.capabilities.dtypes:
        dtype = getattr(torch, name)
        x, rows = _random(5, 3, _SIZE).to(dtype), _random(6, 96, _SIZE).to(dtype)
        weight = bench.selection.kernels.new_linear(96, _SIZE, dtype)
        weight.load_rows(0, rows)
        out = torch.empty(3, 96, dtype=dtype, device=bench.device)
        bench.selection.kernels.linear(x.to(bench.device), weight, out)
        _require_close(bench, out, x.float() @ rows.float().T, name, "linear", figures)
    return Found(figures)


def kernel_attention(bench: Bench) -> Found:
    """Two sequences, one in the middle of its prompt and one decoding, over scattered blocks; on an accelerator in its best
    dtype alone, because each is compiled for seconds."""
    capabilities = bench.platform.capabilities
    names = capabilities.dtypes if capabilities.host_memory else capabilities.dtypes[:1]
    figures: Figures = {}
    heads, dim = TINY_LIMITS.num_heads, TINY_LIMITS.head_dim
    for name in names:
        dtype = getattr(torch, name)
        q = _random(7, sum(_QUERY_LENS), heads * dim).to(dtype)
        cache = _random(8, 6, 2, _BLOCK, TINY_LIMITS.num_kv_heads, dim).to(dtype)
        batch = _attention_batch()
        expected = torch.empty(q.shape)
        TorchKernels("cpu").attention(q.float(), cache.float(), batch, dim**-0.5, 0.0, expected)
        out = torch.empty(q.shape, dtype=dtype, device=bench.device)
        there = _to_device(batch, bench.device)
        bench.selection.kernels.attention(q.to(bench.device), cache.to(bench.device), there, dim**-0.5, 0.0, out)
        _require_close(bench, out, expected, name, "attention", figures)
    return Found(figures)


def kernel_sample(bench: Bench) -> Found:
    """The same tokens as the reference, greedy and with every way to cut the distribution."""
    logits = 3 * _random(9, 6, TINY_LIMITS.vocab_size)
    batch = SamplingBatch(
        temperature=torch.tensor([0.0, 1.0, 0.7, 1.0, 1.3, 0.9]),
        top_k=torch.tensor([0, 0, 20, 0, 0, 40], dtype=torch.int32),
        top_p=torch.tensor([1.0, 1.0, 1.0, 0.8, 1.0, 0.9]),
        min_p=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.05, 0.01]),
        seed=torch.arange(6, dtype=torch.int64) * 7919,
        position=torch.arange(6, dtype=torch.int64) + 11,
        all_greedy=False,
    )
    expected = torch.empty(6, dtype=torch.int64)
    TorchKernels("cpu").sample(logits.clone(), batch, expected)
    out = torch.full((6,), -1, dtype=torch.int64, device=bench.device)
    bench.selection.kernels.sample(logits.to(bench.device, copy=True), _to_device(batch, bench.device), out)
    bench.platform.synchronize()
    if not torch.equal(out.cpu(), expected):
        raise CheckFailed(f"the tokens {out.cpu().tolist()} were sampled instead of {expected.tolist()}")
    return Found({"rows": 6})


def _attention_batch() -> AttentionBatch:
    """Sequence 0 has 37 positions in blocks 4, 1, 3 and its last 6 are new; sequence 1 has 5 in block 2 and decodes."""
    tables = torch.tensor([[4, 1, 3], [2, 0, 0]], dtype=torch.int32)
    slots = [
        int(tables[seq, position // _BLOCK]) * _BLOCK + position % _BLOCK
        for seq, (length, new) in enumerate(zip(_SEQ_LENS, _QUERY_LENS, strict=True))
        for position in range(length - new, length)
    ]
    return AttentionBatch(
        block_tables=tables,
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        query_start=torch.tensor([0, _QUERY_LENS[0], sum(_QUERY_LENS)], dtype=torch.int32),
        seq_lens=torch.tensor(_SEQ_LENS, dtype=torch.int32),
        num_seqs=2,
        max_query_len=max(_QUERY_LENS),
        max_seq_len=max(_SEQ_LENS),
        block_size=_BLOCK,
        window=0,
    )


def _to_device(batch: Batch, device: torch.device) -> Batch:
    moved: dict[str, Any] = {
        f.name: value.to(device) for f in fields(batch) if isinstance(value := getattr(batch, f.name), Tensor)
    }
    return replace(batch, **moved)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest magnitude; not a number where an element is none."""
    scale = max(1.0, float(expected.abs().max()))
    return float((actual.detach().cpu().float() - expected).abs().max()) / scale


def _require_close(bench: Bench, out: Tensor, expected: Tensor, name: str, kernel: str, figures: Figures) -> None:
    bench.platform.synchronize()
    off = _difference(out, expected)
    figures[f"{name}_difference"] = off
    if not off <= _TOLERANCE.get(name, _COARSE):
        raise CheckFailed(f"{kernel} in {name} differs from the reference by {off:.2g}", figures)
