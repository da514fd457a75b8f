"""Times candidates for the hot path on a GPU, beside today's kernels and the device's limits of the same run.

    python benchmarks/cuda_tuning.py [--parts step products decode chunk prefill hopper] [--models qwen3-0.6b] [--json FILE]

Each part is a process with a time limit of its own, so that a kernel which never ends costs one part. All variants are first
compiled by other processes. The winner of `step` is switched on in brim/kernels/triton/choice.py, tiles in tuning.py beside it.
`ratio` is today's time over the candidate's, `limit` the share of what the device could reach, `error` the largest difference
from the reference over its largest value.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from cuda_timing import MODELS, graph_ms
from triton.backends.compiler import GPUTarget
from tuning_cases import Build, Candidate, Case, chunk_cases, decode_cases, prefill_cases
from tuning_products import product_cases
from tuning_step import prefill_step_cases, step_cases

from brim.kernels.triton.compile_pool import CompilePool
from brim.kernels.triton.launch import Launch, launch_now
from brim.kernels.triton.variant import VariantList

PARTS = {"step": 100, "products": 110, "decode": 60, "chunk": 60, "prefill": 60, "hopper": 60}  # seconds each may take
SHOWN = 4  # candidates of a case, beside today's


def builds(part: str, model: str) -> Iterator[Callable[[str, Launch], Iterator[Case]]]:
    """What makes the cases of a part, a few at a time."""
    shape = MODELS[model]
    found: Iterator[tuple[str, Build]] = iter(())
    if part == "step":
        yield lambda device, launch: step_cases(model, shape, device, launch)
    elif part == "products":
        found = product_cases(shape)
    elif part == "decode":
        found = decode_cases(shape)
    elif part == "chunk":
        found = chunk_cases(shape)
    else:
        found = prefill_cases(shape, hopper=part == "hopper")
    for _, build in found:
        yield lambda device, launch, build=build: iter([build(device, launch)])
    if part in ("prefill", "hopper"):
        yield lambda device, launch: prefill_step_cases(model, shape, device, launch, hopper=part == "hopper")


def compile_ahead(part: str, models: list[str]) -> str:
    """Compile every variant of a part in other processes; a line about it."""
    listed = VariantList(GPUTarget("cuda", 90, 32))
    for model in models:
        for make in builds(part, model):
            for case in make("meta", listed):
                for candidate in case.candidates:
                    candidate.calls[0]()
    return CompilePool(listed.variants, listed.target).wait().text


def measure(case: Case, candidate: Candidate) -> dict[str, Any]:
    """One row of the table; `failed` says why there is no time."""
    row: dict[str, Any] = {"name": candidate.name, "today": candidate.is_today}
    if is_dataclass(candidate.setting):
        row["setting"] = asdict(candidate.setting)  # type: ignore[arg-type]
    try:
        if candidate.out is not None:
            candidate.out.zero_()
            candidate.calls[0]()
            torch.cuda.synchronize()
            found = candidate.out.float()
            if candidate.is_today and case.expected is None:
                case.expected = found.clone()
            if case.expected is not None:
                error = (found - case.expected).abs().max() / case.expected.abs().max()
                row["error"] = error.item()
        row["ms"] = graph_ms(candidate.calls)
        row["limit"] = case.limit_ms / row["ms"]
    except Exception as error:  # a candidate that does not fit the device is a result too
        if "illegal" in str(error).lower():
            raise
        row["failed"] = f"{type(error).__name__}: {error}"[:160]
    return row


def show(model: str, case: Case, rows: list[dict[str, Any]]) -> None:
    """The best of a case, today's first."""
    timed = [row for row in rows if "ms" in row]
    today = next((row["ms"] for row in timed if row["today"]), None)
    for row in timed:
        row["ratio"] = today / row["ms"] if today else float("nan")
        row["right"] = row.get("error", 0.0) <= case.worst_error  # NaN is wrong
    print(f"== {model} {case.label}  limit {case.limit_ms * 1000:.1f} us")
    good = sorted((row for row in timed if row["right"]), key=lambda row: row["ms"])
    for row in [row for row in timed if row["today"]] + [row for row in good if not row["today"]][:SHOWN]:
        error = f"{row['error']:.1e}" if "error" in row else "-"
        print(
            f"  {row['name']:28} {row['ms'] * 1000:9.1f} us  ratio {row['ratio']:5.2f}  limit {row['limit']:5.2f}  error {error}"
        )
    for row in rows:
        if row not in good and not row["today"]:
            print(f"  {row['name']:28} {row.get('failed', 'WRONG')}  error {row.get('error', float('nan')):.1e}")
    sys.stdout.flush()


def run_part(part: str, models: list[str], path: Path | None) -> None:
    """Compile and time one part in this process."""
    started = time.monotonic()
    print(f"#### {part}: {compile_ahead(part, models)}", flush=True)
    torch.manual_seed(0)
    results = []
    for model in models:
        for make in builds(part, model):
            for case in make("cuda", launch_now):
                rows = [measure(case, candidate) for candidate in case.candidates]
                show(model, case, rows)
                results.append({"model": model, "case": case.label, "limit_ms": case.limit_ms, "rows": rows})
                if path is not None:
                    path.write_text(json.dumps(results, indent=1) + "\n")
                case.candidates.clear()
            torch.cuda.empty_cache()
    print(f"#### {part} took {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=[*PARTS], choices=[*PARTS])
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--json", type=Path, help="a file; each part adds its name before the ending")
    parser.add_argument("--here", action="store_true", help="run the parts in this process, without a time limit")
    args = parser.parse_args()
    here = Path(__file__).resolve().parent
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    for part in args.parts:
        path = args.json.with_suffix(f".{part}.json") if args.json else None
        if args.here:
            run_part(part, args.models, path)
            continue
        command = [sys.executable, __file__, "--here", "--parts", part, "--models", *args.models]
        try:
            subprocess.run([*command, *(["--json", str(args.json)] if args.json else [])], timeout=PARTS[part], check=False)
        except subprocess.TimeoutExpired:
            print(f"#### {part} was ended after {PARTS[part]} s", flush=True)


if __name__ == "__main__":
    main()
