"""How wrong plans are: configurations planned without the device, then really started, each in a process of its own.

    python benchmarks/plan_accuracy.py --models FOLDER --device h100-80g --json FILE [--first N] [--jobs 2]   # on that GPU
    python benchmarks/plan_accuracy.py --host --device this --json FILE                                      # small, on a CPU
    python benchmarks/plan_accuracy.py draw RECORD PICTURE                                                   # of a record

FOLDER holds the shapes (llama-3.1-8b, qwen3-0.6b) as folders with a config.json; three more are made here. Weights are random.
An error is (real KV tokens - predicted) / real. Exit status 1: a plan said "fits" and the start did not come to be.
"""

from __future__ import annotations

import argparse
import json
import platform as host
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

START_S = 240
GIVEN = ("llama-3.1-8b", "qwen3-0.6b")
# head_dim 64, grouped heads of 1, 4 and 7, tied and untied embeddings
MADE: dict[str, dict[str, Any]] = {
    "heads-of-64": {"vocab_size": 50_304, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                    "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 64},
    "groups-of-7": {"model_type": "qwen2", "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 9472,
                    "num_hidden_layers": 14, "num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128},
    "tied": {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
             "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "heads-of-64": {"vocab_size": 8000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
                    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64},
    "groups-of-7": {"model_type": "qwen2", "vocab_size": 16_000, "hidden_size": 448, "intermediate_size": 1024,
                    "num_hidden_layers": 3, "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 64},
    "tied": {"vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6,
             "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True},
}  # fmt: skip
COMMON = {"model_type": "llama", "max_position_embeddings": 131_072, "torch_dtype": "bfloat16", "eos_token_id": 1}


@dataclass(frozen=True)
class Case:
    """One configuration. alone: it takes the whole device, so no other start may run beside it."""

    shape: str
    settings: dict[str, Any]

    @property
    def alone(self) -> bool:
        """A cap in bytes of at most 36 GiB leaves room for a second start."""
        memory = self.settings.get("memory", "max")
        return not (memory.endswith("GiB") and int(memory.removesuffix("GiB")) <= 36)


def case(shape: str, length: int, seqs: int, mode: str, memory: str, tokens: int | None = None) -> Case:
    """Settings by the names of flags."""
    settings: dict[str, Any] = {"max_model_len": length, "max_num_seqs": seqs, "graph_mode": mode, "memory": memory}
    if tokens is not None:
        settings["max_num_batched_tokens"] = tokens
    return Case(shape, {**settings, "enable_prefix_caching": False})


def device_cases() -> Iterator[Case]:
    """Lengths 2k to 128k, 8 to 1,024 sequences, every graph mode, caps from 20 GiB to all of 80 GB."""
    yield case("llama-3.1-8b", 8192, 256, "FULL_AND_PIECEWISE", "max")
    yield case("llama-3.1-8b", 2048, 1024, "FULL", "max", 16_384)
    yield case("llama-3.1-8b", 131_072, 8, "FULL_DECODE_ONLY", "max")
    yield case("llama-3.1-8b", 32_768, 64, "PIECEWISE", "90%")
    yield case("llama-3.1-8b", 8192, 256, "NONE", "60%", 2048)
    yield case("llama-3.1-8b", 4096, 128, "FULL_AND_PIECEWISE", "20GiB", 4096)
    yield case("llama-3.1-8b", 16_384, 32, "FULL", "30GiB")
    yield case("qwen3-0.6b", 8192, 256, "FULL_AND_PIECEWISE", "max")
    yield case("qwen3-0.6b", 40_960, 1024, "FULL", "max")
    yield case("qwen3-0.6b", 2048, 8, "NONE", "95%")
    yield case("qwen3-0.6b", 8192, 64, "PIECEWISE", "20GiB", 2048)
    yield case("qwen3-0.6b", 32_768, 512, "FULL_DECODE_ONLY", "24GiB")
    yield case("qwen3-0.6b", 4096, 1024, "FULL_AND_PIECEWISE", "32GiB", 16_384)
    yield case("heads-of-64", 2048, 256, "FULL_AND_PIECEWISE", "max")
    yield case("heads-of-64", 131_072, 8, "PIECEWISE", "60%")
    yield case("heads-of-64", 8192, 128, "FULL", "20GiB", 2048)
    yield case("heads-of-64", 16_384, 1024, "NONE", "30GiB")
    yield case("groups-of-7", 131_072, 64, "FULL_AND_PIECEWISE", "max")
    yield case("groups-of-7", 8192, 8, "FULL_DECODE_ONLY", "20GiB")
    yield case("groups-of-7", 4096, 512, "PIECEWISE", "24GiB", 4096)
    yield case("groups-of-7", 65_536, 256, "FULL", "36GiB")
    yield case("tied", 131_072, 1024, "FULL_AND_PIECEWISE", "max")
    yield case("tied", 2048, 16, "FULL", "20GiB")
    yield case("tied", 32_768, 256, "NONE", "32GiB", 16_384)
    yield case("tied", 8192, 512, "FULL_DECODE_ONLY", "28GiB", 2048)
    yield case("llama-3.1-8b", 131_072, 1024, "FULL_AND_PIECEWISE", "20GiB", 16_384)  # does not fit: must be refused


def host_cases() -> Iterator[Case]:
    """Small shapes and the demo model under a cap, in host memory."""
    for shape in SMALL:
        yield case(shape, 4096, 16, "FULL_DECODE_ONLY", "1GiB")
        yield case(shape, 2048, 64, "NONE", "800MiB", 512)
        yield case(shape, 1024, 4, "FULL_DECODE_ONLY", "enough")
    yield case("demo", 4096, 16, "FULL_DECODE_ONLY", "1500MiB")
    yield case("demo", 2048, 8, "NONE", "enough")
    yield case("tied", 32_768, 64, "NONE", "350MiB", 2048)  # does not fit: must be refused


def write_shapes(root: Path, shapes: dict[str, dict[str, Any]]) -> None:
    """A folder with a config.json for each."""
    for name, config in shapes.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps({**COMMON, **config}))


def planned(cases: list[tuple[str, Case]], device: str) -> list[dict[str, Any]]:
    """All plans, made in a process of its own, which ends before anything starts."""
    task = json.dumps({"device": device, "cases": [[model, one.settings] for model, one in cases]})
    done = subprocess.run([sys.executable, __file__, "plan"], input=task, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"no plans: {done.stderr[-2000:]}")
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def plan_child() -> None:
    """Read the task, plan each case, print a list."""
    from brim.cli.options import build_config
    from brim.planning import plan_starts

    task, found = json.load(sys.stdin), []
    for model, settings in task["cases"]:
        started = time.perf_counter()
        (plan,) = plan_starts([build_config(model, settings)], [task["device"]])["plans"]
        seconds = round(time.perf_counter() - started, 3)
        refused = plan["refused"]["message"] if plan["refused"] else None
        found.append({"fits": plan["fits"], "kv_tokens": plan.get("kv_tokens"), "seconds": seconds, "refused": refused,
                      "ledger": plan["plan"]["ledger"] if plan["fits"] else []})  # fmt: skip
    print(json.dumps(found))


def start_child(model: str, settings: str) -> None:
    """The engine as `brim serve` starts it in its own process, without a server and a tokenizer; its outcome as a line."""
    from brim.cli.options import build_config
    from brim.errors import MemoryBudgetError
    from brim.runtime import build_engine_core

    load = {} if model == "demo" else {"load_format": "dummy"}
    try:
        core, info = build_engine_core(build_config(model, {**load, **json.loads(settings)}), lambda progress: None)
    except MemoryBudgetError as error:
        print(json.dumps({"outcome": "refused", "message": str(error)[:600]}))
        return
    report = core.executor.memory_report()
    print(json.dumps({"outcome": "started", "kv_tokens": info["kv_tokens"], "graph_mode": info["graph_mode"],
                      "cap_bytes": info["cap_bytes"], "over_the_cap_bytes": report["peak_bytes"] - info["cap_bytes"],
                      "ledger": report["ledger"]}))  # fmt: skip
    core.executor.close()


def started(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A real start, in a process of its own."""
    command = [sys.executable, __file__, "start", model, json.dumps(settings)]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
    except subprocess.TimeoutExpired:
        return {"outcome": "died", "message": f"not ready after {START_S} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"outcome"')]
    failed = {"outcome": "died", "message": f"status {done.returncode}: {done.stderr[-800:]}"}
    return {**(json.loads(lines[-1]) if lines else failed), "seconds": round(time.perf_counter() - began, 1)}


def judged(one: Case, plan: dict[str, Any], real: dict[str, Any]) -> dict[str, Any]:
    """A row of the record."""
    row: dict[str, Any] = {"shape": one.shape, "settings": one.settings, "plan": plan, "real": real, "error": None}
    if plan["fits"] and real["outcome"] == "started":
        row["error"] = (real["kv_tokens"] - plan["kv_tokens"]) / real["kv_tokens"]
    row["wrong"] = plan["fits"] and real["outcome"] != "started"
    row["too_careful"] = not plan["fits"] and real["outcome"] == "started"
    return row


def say(row: dict[str, Any]) -> None:
    """One line for people."""
    settings, plan, real = row["settings"], row["plan"], row["real"]
    text = f"{row['shape']:<13}{settings['max_model_len']:>8}{settings['max_num_seqs']:>6} {settings['graph_mode']:<19}"
    text += f"{settings['memory']:>8}{plan['kv_tokens'] or '-':>10}{real.get('kv_tokens', real['outcome']):>10}"
    print(text + ("" if row["error"] is None else f"{100 * row['error']:>9.3f} %"), flush=True)


def summed_up(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and worst error, and what must never happen."""
    errors = sorted(abs(row["error"]) for row in rows if row["error"] is not None)
    return {
        "configurations": len(rows),
        "compared": len(errors),
        "median_error": statistics.median(errors) if errors else None,
        "worst_error": max(errors, default=None),
        "said_fits_and_did_not_start": [row["shape"] for row in rows if row["wrong"]],
        "said_no_and_started": [row["shape"] for row in rows if row["too_careful"]],
        "refused_by_both": sum(not row["plan"]["fits"] and row["real"]["outcome"] == "refused" for row in rows),
        "over_the_cap": [row["shape"] for row in rows if row["real"].get("over_the_cap_bytes", 0) > 0],
    }


def draw(record: Path, picture: Path) -> None:
    """Each configuration's error over its real KV tokens, with the two limits that a plan must keep."""
    from matplotlib.figure import Figure

    stored = json.loads(record.read_text(encoding="utf-8"))
    rows = [row for row in stored["rows"] if row["error"] is not None]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for marker, shape in zip("osD^v", dict.fromkeys(row["shape"] for row in rows), strict=False):
        mine = [row for row in rows if row["shape"] == shape]
        tokens = [row["real"]["kv_tokens"] for row in mine]
        axes.scatter(tokens, [100 * row["error"] for row in mine], marker=marker, s=28, label=shape)
    axes.axhspan(-0.5, 0.5, color="0.92", zorder=0, label="median must lie here")
    for limit in (-2, 2):
        axes.axhline(limit, color="0.6", linestyle="--", linewidth=0.8)
    axes.set(xscale="log", xlabel="KV tokens that were there", ylabel="more than planned, %", ylim=(-2.2, 2.2))
    axes.set_title(stored["device"])
    axes.legend(fontsize=8, ncols=3)
    figure.savefig(picture, dpi=130)


def main() -> None:
    """Plan all, start all, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--device", default="this")
    parser.add_argument("--first", type=int, default=None)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_shapes(root, SMALL if args.host else MADE)
        cases = list(host_cases() if args.host else device_cases())[: args.first]
        where = {name: args.models / name for name in GIVEN} if args.models else {}
        named = [("demo" if c.shape == "demo" else str(where.get(c.shape, root / c.shape)), c) for c in cases]
        plans = planned(named, args.device)
        rows: dict[int, dict[str, Any]] = {}

        def work(index: int) -> None:
            model, one = named[index]
            rows[index] = judged(one, plans[index], started(model, one.settings))
            say(rows[index])

        together = [i for i, one in enumerate(cases) if not one.alone]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(work, together))
        for index in (i for i, one in enumerate(cases) if one.alone):
            work(index)
    found = [rows[index] for index in sorted(rows)]
    shown = ["DIR" if args.models and word == str(args.models) else word for word in sys.argv[1:]]
    record = {
        "command": "python benchmarks/plan_accuracy.py " + " ".join(shown),
        "device": args.device,
        "versions": {name: version(name) for name in ("brim", "torch")} | {"python": host.python_version()},
        "seconds": round(time.perf_counter() - began, 1),
        "summary": summed_up(found),
        "rows": found,
    }
    print(json.dumps(record["summary"], indent=1))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    raise SystemExit(1 if record["summary"]["said_fits_and_did_not_start"] else 0)


if __name__ == "__main__":
    if sys.argv[1:] == ["plan"]:
        plan_child()
    elif sys.argv[1:2] == ["start"]:
        start_child(*sys.argv[2:])
    elif sys.argv[1:2] == ["draw"]:
        draw(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
