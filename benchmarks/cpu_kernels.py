"""Speed of the CPU kernels at the shapes of two models, beside the limits of the machine measured in the same run.

    python benchmarks/cpu_kernels.py [--model demo] [--rows 1 8 16] [--threads 2] [--dtype bfloat16] [--no-torch]

Each line is one matrix shape at M rows: the median time of one product (over copies that exceed the last-level cache, as
layers do), its weight bytes per second and operations per second, their share of the limits, and how many times faster than
torch's own linear it is. "whole model" runs all layers' products and the LM head as one recorded program.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from model_shapes import GEMMA_3_270M, QWEN3_0_6B, ModelShape
from torch import Tensor

from brim.kernels.base import AttentionBatch, LinearWeight, SamplingBatch
from brim.kernels.cpu.kernels import CpuKernels
from brim.kernels.select import select_kernels

CACHE_BYTES = 160 << 20  # more than any last-level cache here: copies of a matrix are cycled through


MODELS = {
    "demo": GEMMA_3_270M,
    "qwen3-0.6b": QWEN3_0_6B,
}


def median_s(work: Callable[[], object], budget_s: float = 0.6, least: int = 5) -> float:
    """Median seconds of one call, after one call to warm up."""
    work()
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < least or (time.perf_counter() < end and len(times) < 200):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Limits:
    """What the machine does at best: bytes read per second and operations per second."""

    def __init__(self, dtype: torch.dtype) -> None:
        data = torch.ones(96 << 20, dtype=torch.float32)
        self.bytes_per_s = data.numel() * 4 / min(median_s(data.sum), median_s(data.sum))
        size = 2048
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        out = torch.empty(size, size, dtype=dtype)
        self.ops_per_s = 2 * size**3 / median_s(lambda: torch.mm(a, b, out=out), 1.5)


def filled(kernels: CpuKernels, out_features: int, in_features: int, dtype: torch.dtype) -> LinearWeight:
    weight = kernels.new_linear(out_features, in_features, dtype)
    for first in range(0, out_features, 16384):
        weight.load_rows(first, torch.randn(min(16384, out_features - first), in_features) / in_features**0.5)
    return weight


class Bench:
    def __init__(self, kernels: CpuKernels, limits: Limits, dtype: torch.dtype, with_torch: bool) -> None:
        self.kernels, self.limits, self.dtype, self.with_torch = kernels, limits, dtype, with_torch

    def time_program(self, calls: Callable[[], None]) -> float:
        with self.kernels.record() as program:
            calls()
        return median_s(program.replay)

    def shape(self, name: str, out_features: int, in_features: int, all_rows: list[int], out_dtype: torch.dtype) -> None:
        copies = max(1, -(-CACHE_BYTES // self.kernels.linear_num_bytes(out_features, in_features, self.dtype)))
        weights = [filled(self.kernels, out_features, in_features, self.dtype) for _ in range(copies)]
        plain = [weight.to_dense() for weight in weights] if self.with_torch else []
        for rows in all_rows:
            x = torch.randn(rows, in_features).to(self.dtype)
            out = torch.empty(rows, out_features, dtype=out_dtype)
            seconds = self.time_program(lambda x=x, out=out: self._all(x, weights, out)) / copies  # type: ignore[misc]
            theirs = 0.0
            if plain:
                theirs = median_s(lambda x=x: [torch.nn.functional.linear(x, w) for w in plain]) / copies  # type: ignore[misc]
            self.report(name, rows, seconds, theirs, weights[0].num_bytes, 2 * rows * out_features * in_features)

    def _all(self, x: Tensor, weights: list[LinearWeight], out: Tensor) -> None:
        for weight in weights:
            self.kernels.linear(x, weight, out)

    def report(self, name: str, rows: int, seconds: float, theirs: float, num_bytes: int, ops: int) -> None:
        rate, speed = num_bytes / seconds, ops / seconds
        text = f"{name:24} M={rows:<4} {seconds * 1e3:9.3f} ms {rate / 1e9:7.1f} GB/s ({rate / self.limits.bytes_per_s:4.0%})"
        text += f" {speed / 1e9:7.1f} GFLOP/s ({speed / self.limits.ops_per_s:4.0%})"
        print(text + (f"  {theirs / seconds:5.2f} x torch" if theirs else ""), flush=True)

    def whole_model(self, name: str, shapes: ModelShape, all_rows: list[int]) -> None:
        """All products of a step; the LM head runs for one row a sequence (M rows up to 16, one row for a prefill)."""
        layers = [
            {k: filled(self.kernels, n, d, self.dtype) for k, (n, d) in shapes.linears().items()} for _ in range(shapes.layers)
        ]
        head = filled(self.kernels, shapes.vocab, shapes.hidden, self.dtype)
        total = head.num_bytes + sum(w.num_bytes for layer in layers for w in layer.values())
        for rows in all_rows:
            logit_rows = rows if rows <= 16 else 1
            buffers = {k: torch.randn(rows, d).to(self.dtype) for k, (_, d) in shapes.linears().items()}
            outs = {k: torch.empty(rows, n, dtype=self.dtype) for k, (n, _) in shapes.linears().items()}
            hidden, logits = torch.randn(logit_rows, shapes.hidden).to(self.dtype), torch.empty(logit_rows, shapes.vocab)

            def calls(buffers=buffers, outs=outs, hidden=hidden, logits=logits) -> None:  # type: ignore[no-untyped-def]
                for layer in layers:
                    for key, weight in layer.items():
                        self.kernels.linear(buffers[key], weight, outs[key])
                self.kernels.linear(hidden, head, logits)

            seconds = self.time_program(calls)
            ops = 2 * rows * sum(n * d for n, d in shapes.linears().values()) * shapes.layers
            self.report(f"{name} whole model", rows, seconds, 0.0, total, ops + 2 * logit_rows * shapes.vocab * shapes.hidden)

    def attention(self, name: str, shapes: ModelShape) -> None:
        for query_len, seqs, length in ((1, 1, 1024), (1, 8, 1024), (128, 1, 128), (512, 1, 1024)):
            q, cache, batch = attention_inputs(shapes, query_len, seqs, length, self.dtype)
            out = torch.empty_like(q)
            seconds = self.time_program(lambda q=q, c=cache, b=batch, o=out: self.kernels.attention(q, c, b, 0.1, 0.0, o))  # type: ignore[misc]
            pairs = seqs * sum(length - query_len + i + 1 for i in range(query_len))
            ops = 4 * pairs * shapes.heads * shapes.head_dim
            read = seqs * length * 2 * shapes.kv_heads * shapes.head_dim * self.dtype.itemsize
            self.report(f"{name} attn {seqs}x{query_len}@{length}", query_len * seqs, seconds, 0.0, read, ops)

    def logits(self, name: str, shapes: ModelShape) -> None:
        kinds = (("greedy", 0, 1.0, True), ("t=1", 0, 1.0, False), ("k=50 p=.9", 50, 0.9, False), ("p=.95", 0, 0.95, False))
        for rows in (1, 8):
            source = torch.randn(rows, shapes.vocab) * 3
            for label, top_k, top_p, greedy in kinds:
                seconds = self.time_sample(source, sampling_batch(rows, top_k, top_p, greedy))
                print(f"{name} sample {label:10} rows={rows}: {seconds * 1e3:.3f} ms", flush=True)

    def time_sample(self, source: Tensor, batch: SamplingBatch) -> float:
        """Sampling overwrites its logits: they are copied afresh each time and the copy is not counted."""
        logits, out, times = source.clone(), torch.empty(source.shape[0], dtype=torch.int64), []
        for _ in range(50):
            logits.copy_(source)
            start = time.perf_counter()
            self.kernels.sample(logits, batch, out)
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def attention_inputs(
    shapes: ModelShape, query_len: int, seqs: int, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, AttentionBatch]:
    blocks = -(-length // 16)
    pool = torch.randn(blocks * seqs, 4, 2, 16, shapes.kv_heads, shapes.head_dim).to(dtype)
    tables = torch.randperm(blocks * seqs).int().view(seqs, blocks)
    starts = torch.arange(seqs + 1, dtype=torch.int32) * query_len
    lens = torch.full((seqs,), length, dtype=torch.int32)
    slots = torch.zeros(seqs * query_len, dtype=torch.int64)
    batch = AttentionBatch(tables, slots, starts, lens, seqs, query_len, length, 16, 0)
    return torch.randn(seqs * query_len, shapes.heads * shapes.head_dim).to(dtype), pool[:, 1], batch


def sampling_batch(rows: int, top_k: int, top_p: float, greedy: bool) -> SamplingBatch:
    return SamplingBatch(
        torch.full((rows,), 0.0 if greedy else 1.0),
        torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p),
        torch.zeros(rows),
        torch.arange(rows),
        torch.arange(rows),
        greedy,
    )


def call_overhead_s(kernels: CpuKernels) -> Iterator[tuple[str, float]]:
    """Seconds of a direct call that has next to nothing to do."""
    weight = filled(kernels, 16, 2, torch.float32)
    x, out, ones = torch.zeros(1, 2), torch.zeros(1, 16), torch.ones(2)
    for name, call in (
        ("linear", lambda: kernels.linear(x, weight, out)),
        ("rms_norm", lambda: kernels.rms_norm(x, ones, 1e-6, x)),
    ):
        yield name, median_s(lambda call=call: [call() for _ in range(1000)]) / 1000  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 128, 512])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--no-torch", action="store_true", help="skip torch's own linear")
    parser.add_argument("--only", choices=["shapes", "whole", "attention", "logits", "calls"], help="one part only")
    args = parser.parse_args()
    selection = select_kernels("cpu", args.threads)
    kernels = selection.kernels
    if not isinstance(kernels, CpuKernels):
        raise SystemExit(f"native kernels are not available: {selection.fallback_reason}")
    torch.set_num_threads(kernels.num_threads)
    dtype = getattr(torch, args.dtype)
    limits = Limits(dtype)
    print(f"{kernels.num_threads} threads; limits: {limits.bytes_per_s / 1e9:.1f} GB/s, {limits.ops_per_s / 1e9:.0f} GFLOP/s")
    bench = Bench(kernels, limits, dtype, not args.no_torch)
    if args.only in (None, "calls"):
        for name, seconds in call_overhead_s(kernels):
            print(f"direct call {name}: {seconds * 1e6:.2f} us")
    for name, shapes in MODELS.items():
        if args.model not in (name, "all"):
            continue
        if args.only in (None, "whole"):
            bench.whole_model(name, shapes, args.rows)
        if args.only in (None, "attention"):
            bench.attention(name, shapes)
        if args.only in (None, "logits"):
            bench.logits(name, shapes)
        if args.only in (None, "shapes"):
            for key, (out_features, in_features) in shapes.linears().items():
                bench.shape(f"{name} {key}", out_features, in_features, args.rows, dtype)
            bench.shape(f"{name} lm_head", shapes.vocab, shapes.hidden, [r for r in args.rows if r <= 16], torch.float32)


if __name__ == "__main__":
    main()
