"""Searches launch choices of the Triton kernels on a GPU; what it finds is written into brim.kernels.triton.tuning by hand.

    python benchmarks/cuda_tuning.py [--parts decode prefill products] [--workers 12] [--json FILE]

All variants are compiled first, by several processes into Triton's cache, then timed one after the other as graph replays.
"""
# ruff: noqa: B023 (every call is timed before its loop moves on)

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from cuda_timing import MODELS, ModelShape, causal_flops, copies_for, graph_ms, paged_case

from brim.kernels.triton.attention import AttentionLauncher
from brim.kernels.triton.kernels import core_count
from brim.kernels.triton.matmul import matmul_kernel, vector_product_kernel
from brim.kernels.triton.scratch import KernelLimits, Scratch
from brim.kernels.triton.tuning import AttentionTile

Variant = dict[str, Any]
MOST_PROGRAMS_PER_CORE = 8


def launcher(shape: ModelShape) -> AttentionLauncher:
    """A launcher with scratch memory for every variant."""
    cores = core_count(torch.device("cuda"))
    limits = KernelLimits(256, shape.heads, shape.kv_heads, shape.head_dim, 16)
    return AttentionLauncher(limits, Scratch(limits, cores * MOST_PROGRAMS_PER_CORE, torch.device("cuda")), 1)


# an indirect load (table, then tile) takes stages two at a time: 3, 5 and 7 hold one, two and three tiles ahead
DECODE = (
    "64 4 3 2,64 4 5 2,64 4 7 2,64 4 5 1,32 4 3 2,32 4 5 2,32 4 7 2,32 2 5 4,32 2 7 4,64 2 5 3,64 2 3 4,64 8 5 1,"
    "128 4 5 1,128 8 5 1"
)
PREFILL = "128 64 8 2,128 64 8 3,128 64 8 5,128 128 8 2,128 128 8 3,128 32 8 3,128 32 8 5,64 64 4 2,64 64 4 3,64 64 4 5,64 32 4 5"
VECTOR = "1 1024 2 3,1 2048 4 3,2 1024 2 3,2 1024 4 3,2 2048 4 3,4 1024 4 3,4 2048 8 3,8 1024 8 3"
SKINNY = "16 128 4 4,16 256 4 4,16 256 2 3,16 512 4 3,32 128 4 4,32 256 4 3,32 256 4 4"


def variants_of(text: str, *names: str) -> list[Variant]:
    """ "64 4,32 8" with names keys, warps -> one dict a group of numbers."""
    return [dict(zip(names, map(int, group.split()), strict=True)) for group in text.split(",")]


def decode_variants() -> list[Variant]:
    """Tiles and programs per core of decode attention."""
    return variants_of(DECODE, "keys", "warps", "stages", "per_core")


def prefill_variants() -> list[Variant]:
    """Tiles of prefill attention."""
    return variants_of(PREFILL, "rows", "keys", "warps", "stages")


def product_variants(rows: int) -> list[Variant]:
    """Tiles of the small matrix products."""
    return variants_of(VECTOR if rows == 1 else SKINNY, "cols", "depth", "warps", "stages")


DECODE_LOADS = ((1, 128), (1, 2048), (1, 32768), (8, 128), (8, 4096), (64, 128), (64, 2048))
QUICK_LOADS = ((1, 128),)


def decode_times(shape: ModelShape, variants: list[Variant], timer: Callable[..., float], loads: Any = DECODE_LOADS) -> Any:
    """ms of each variant under each load."""
    run, table = launcher(shape), []
    cases = {f"{b}x{n}": paged_case(shape, [1] * b, [n] * b) for b, n in loads}
    for variant in variants:
        parts = core_count(torch.device("cuda")) * variant["per_core"] // shape.kv_heads
        tile = AttentionTile(16, variant["keys"], variant["warps"], variant["stages"])
        ms = {}
        for name, case in cases.items():
            calls = [
                lambda kv=kv, case=case: run.launch_decode(case.q, kv, case.batch, case.scale, 0.0, case.out, tile, parts)
                for kv in case.layers
            ]
            ms[name] = timed(timer, calls)
        table.append(variant | {"ms": ms})
    return table


def prefill_times(shape: ModelShape, variants: list[Variant], timer: Callable[..., float], tokens: int = 8000) -> Any:
    """ms and TFLOP/s of each variant."""
    run, table = launcher(shape), []
    case = paged_case(shape, [tokens], [tokens])
    for variant in variants:
        tile = AttentionTile(variant["rows"], variant["keys"], variant["warps"], variant["stages"])
        kv = case.layers[0]
        calls = [lambda: run.launch_prefill(case.q, kv, case.batch, case.scale, 0.0, case.out, tile, skip_decodes=False)] * 2
        ms = timed(timer, calls)
        table.append(variant | {"ms": ms, "tflops": causal_flops(shape, tokens) / max(ms, 1e-9) / 1e9})
    return table


def product_times(size: tuple[int, int], rows: int, variants: list[Variant], timer: Callable[..., float]) -> Any:
    """ms of each variant, and of the matrix library."""
    cols, depth = size
    count = copies_for(cols * depth * 2)
    weights = torch.randn(count, cols, depth, device="cuda", dtype=torch.bfloat16)
    x, out = (torch.randn(rows, n, device="cuda", dtype=torch.bfloat16) for n in (depth, cols))
    table: list[Variant] = [{"library": True, "ms": timed(timer, [lambda w=w: torch.mm(x, w.t(), out=out) for w in weights])}]
    for variant in variants:
        tile = {"COLS": cols, "DEPTH": depth, "COLS_BLOCK": variant["cols"], "DEPTH_BLOCK": variant["depth"], "HAS_BIAS": False}
        tile |= {"num_warps": variant["warps"], "num_stages": variant["stages"]}
        grid = -(-cols // variant["cols"])
        if rows == 1:
            calls = [lambda w=w: vector_product_kernel[(grid,)](x, w, w, out, w.stride(0), **tile) for w in weights]
        else:
            tile |= {"ROWS_BLOCK": 16}
            calls = [
                lambda w=w: matmul_kernel[(grid, -(-rows // 16))](
                    x,
                    w,
                    w,
                    out,
                    rows,
                    x.stride(0),
                    w.stride(0),
                    out.stride(0),
                    **tile,
                )
                for w in weights
            ]
        ms = timed(timer, calls)
        if timer is not compile_only and ms < float("inf"):
            out.fill_(float("nan"))
            calls[0]()
            error = (out.float() - x.float() @ weights[0].float().t()).abs().max().item()
            assert error < 0.02 * depth**0.5, f"wrong product: {variant} {error}"
        table.append(variant | {"ms": ms})
    return table


def timed(timer: Callable[..., float], calls: list[Callable[[], None]]) -> float:
    """The timer's figure; infinity for a variant that does not fit the device."""
    try:
        return timer(calls)
    except Exception as error:
        if "resource" not in str(error).lower():
            raise
        return float("inf")


def compile_only(calls: list[Callable[[], None]]) -> float:
    """Compile and load what the first call needs."""
    calls[0]()
    return 0.0


def jobs(parts: list[str], models: list[str]) -> list[tuple[str, str, Any, list[Variant]]]:
    """(part, model, detail, variants) of everything asked for."""
    found: list[tuple[str, str, Any, list[Variant]]] = []
    for name, shape in MODELS.items():
        if name not in models:
            continue
        if "decode" in parts:
            found.append(("decode", name, None, decode_variants()))
        if "prefill" in parts:
            found.append(("prefill", name, None, prefill_variants()))
        if "products" in parts:
            sizes = shape.linears() | {"lm_head": (shape.vocab, shape.hidden)}
            found += [
                ("products", name, (label, size, m), list(product_variants(m))) for label, size in sizes.items() for m in (1, 8)
            ]
    return found


def perform(job: tuple[str, str, Any, list[Variant]], *, quick: bool) -> Any:
    """Time a job's variants, or only compile them."""
    part, name, detail, variants = job
    shape, timer = MODELS[name], compile_only if quick else graph_ms
    if part == "decode":
        return decode_times(shape, variants, timer, QUICK_LOADS if quick else DECODE_LOADS)
    if part == "prefill":
        return prefill_times(shape, variants, timer, 256 if quick else 8000)
    return product_times(detail[1], detail[2], variants, timer)


def compile_share(parts: list[str], models: list[str], index: int, count: int) -> None:
    """Compile every count-th variant; runs in a process of its own."""
    for job in jobs(parts, models):
        perform((*job[:3], job[3][index::count]), quick=True)


def report(job: tuple[str, str, Any, list[Variant]], table: Any) -> None:
    """The best few of a job."""
    part, name, detail, _ = job
    print(f"== {part} {name} {detail or ''}")
    if part == "decode":
        best = {load: min(row["ms"][load] for row in table) for load in table[0]["ms"]}
        for row in table:
            row["worst_ratio"] = max(row["ms"][load] / best[load] for load in best)
            row["mean_ratio"] = sum(row["ms"][load] / best[load] for load in best) / len(best)
        table.sort(key=lambda row: row["mean_ratio"])
        print("best us", {load: round(ms * 1000, 1) for load, ms in best.items()})
        for row in table[:6]:
            print({k: v for k, v in row.items() if k != "ms"}, [round(v * 1000, 1) for v in row["ms"].values()])
        return
    table.sort(key=lambda row: row["ms"])
    library = [row["ms"] * 1000 for row in table if row.get("library")]
    for row in table[: 5 if part == "prefill" else 2]:
        print({k: round(v * 1000, 2) if k == "ms" else v for k, v in row.items()}, "library us", [round(t, 2) for t in library])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["decode", "prefill", "products"])
    parser.add_argument("--models", nargs="+", default=[*MODELS])
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        shares = [pool.submit(compile_share, args.parts, args.models, index, args.workers) for index in range(args.workers)]
        for share in shares:
            share.result()
    results = []
    for job in jobs(args.parts, args.models):
        table = perform(job, quick=False)
        report(job, table)
        results.append({"part": job[0], "model": job[1], "detail": job[2], "table": table})
        if args.json:
            args.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
