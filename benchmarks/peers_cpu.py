"""Brim beside its peers on this CPU, in one run: the tables of the record.

Each engine runs alone in a process of its own, with all cores, on the same weights and the same token ids, greedy. Peers that
are not installed are left out and named.

    python benchmarks/peers_cpu.py                                   what this environment has
    python benchmarks/peers_cpu.py --python llama.cpp=/path/to/python --python vllm-cpu=/path/to/python
    python benchmarks/peers_cpu.py --models demo --engines brim --output-len 64

Writes benchmarks/results/peers-cpu-<date>.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peer_models import PeerModel, demo_model, qwen3_model
from workloads import MIXED_16_NEW_TOKENS, equal_prompts, mixed_16

HERE = Path(__file__).resolve().parent
MODELS = {"demo": demo_model, "qwen3-0.6b": qwen3_model}
ENGINES = ("brim", "transformers", "vllm-cpu", "llama.cpp")
MODULE_OF = {"brim": "brim", "transformers": "transformers", "vllm-cpu": "vllm", "llama.cpp": "llama_cpp"}
COLUMNS = (
    ("start_s", "start s", "{:.2f}"),
    ("first_token_s", "first token s", "{:.2f}"),
    ("prefill_128_ms", "prefill 128 ms", "{:.0f}"),
    ("decode_b1_ms", "decode b1 ms", "{:.1f}"),
    ("prefill_8x128_ms", "prefill 8x128 ms", "{:.0f}"),
    ("decode_b8_ms", "decode b8 ms/step", "{:.1f}"),
    ("mixed_16_s", "16 mixed s", "{:.2f}"),
    ("peak_rss_mib", "peak RSS MiB", "{:,.0f}"),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One row: an engine on one form of a model. dtype auto: quantised weights stay as they are."""

    label: str
    engine: str
    path: Path
    dtype: str = "bfloat16"


def entries_of(model: PeerModel) -> list[Entry]:
    """The rows of a model's table."""
    rows = [Entry("transformers (bf16)", "transformers", model.folder), Entry("vllm-cpu (bf16)", "vllm-cpu", model.folder)]
    rows += [Entry(f"llama.cpp ({kind})", "llama.cpp", path) for kind, path in model.gguf.items()]
    rows += [Entry("brim (bf16)" if model.dummy else "brim (bf16, from safetensors)", "brim", model.folder)]
    if not model.dummy:
        rows += [Entry("brim (bf16, from the Q4_K_M GGUF)", "brim", model.gguf["Q4_K_M"])]
        rows += [Entry("brim (Q4_K_M)", "brim", model.gguf["Q4_K_M"], "auto")]
    return rows


def task_of(model: PeerModel, entry: Entry, options: argparse.Namespace) -> dict[str, Any]:
    """What the child measures."""
    return {
        "engine": entry.engine,
        "model": str(entry.path),
        "dtype": entry.dtype,
        "dummy": model.dummy,
        "tokenizer": None if model.dummy else str(model.gguf["Q4_K_M"]),
        "threads": len(os.sched_getaffinity(0)),
        "context": 512,  # 128 + 16 + 256 and 231 + 64 fit; llama.cpp gets as many tokens in all
        "output_len": options.output_len,
        "decode_iters": options.decode_iters,
        "prompts_1": [[list(p) for p in equal_prompts(1, 128, model.vocab_size, seed)] for seed in range(5)],
        "prompts_8": [[list(p) for p in equal_prompts(8, 128, model.vocab_size, seed)] for seed in range(3)],
        "mixed": [list(p) for p in mixed_16(model.vocab_size).prompts],
        "mixed_new_tokens": MIXED_16_NEW_TOKENS,
    }


def run_entry(python: str, task: dict[str, Any]) -> dict[str, Any]:
    """The child's result, or {"error": its last words}."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        task["started_at"] = time.monotonic()
        json.dump(task, file)
        file.flush()
        done = subprocess.run([python, str(HERE / "peer_engines.py"), file.name], capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if lines and lines[-1].startswith("{"):
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]}


def has_module(python: str, module: str) -> bool:
    """Whether that interpreter can find the module (without importing it)."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], check=False, capture_output=True).returncode == 0


def machine() -> dict[str, Any]:
    """The CPU the figures hold for."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict([part.strip() for part in line.split(":", 1)] for line in reversed(lines) if ":" in line)
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
    return {
        "device": facts.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "features": [name for name in wanted if name in facts.get("flags", "").split()],
        "python": platform.python_version(),
    }


def table(name: str, rows: dict[str, dict[str, Any]]) -> str:
    """One model's table in markdown."""
    lines = [f"| {name} | " + " | ".join(title for _, title, _ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for label, row in rows.items():
        cells = [form.format(row[key]) if key in row else "-" for key, _, form in COLUMNS]
        lines.append(f"| {label} | " + " | ".join(cells) + " |" + (f" <!-- {row['error']} -->" if "error" in row else ""))
    return "\n".join(lines)


def parse_options() -> argparse.Namespace:
    """The flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH", help="interpreter that has this engine")
    parser.add_argument("--output-len", type=int, default=256, help="decode steps that are timed")
    parser.add_argument("--decode-iters", type=int, default=3, help="repetitions, of which the best counts")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    return parser.parse_args()


def without_path(argument: str) -> str:
    """The argument as the record shows it: where an interpreter lies is this machine's own."""
    engine, equals, _ = argument.partition("=")
    return f"{engine}=PATH" if equals and engine in ENGINES else argument


def main() -> int:
    """Measure, print and record."""
    options = parse_options()
    pythons = dict.fromkeys(ENGINES, sys.executable) | dict(entry.split("=", 1) for entry in options.python)
    engines = [name for name in options.engines if has_module(pythons[name], MODULE_OF[name])]
    missing = sorted(set(options.engines) - set(engines))
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "benchmarks/peers_cpu.py", *map(without_path, sys.argv[1:])]),
        **machine(),
        "not_installed": missing,
        "models": {},
    }
    for name in options.models:
        model = MODELS[name]()
        rows: dict[str, dict[str, Any]] = {}
        for entry in entries_of(model):
            if entry.engine in engines:
                print(f"{name}: {entry.label} ...", file=sys.stderr, flush=True)
                load = os.getloadavg()[0]
                rows[entry.label] = run_entry(pythons[entry.engine], task_of(model, entry, options)) | {"load_before": load}
                print(f"  {json.dumps(rows[entry.label])}", file=sys.stderr, flush=True)
        record["models"][name] = rows
    versions = {e: row["version"] for rows in record["models"].values() for e, row in rows.items() if "version" in row}
    head = (
        f"{record['device']}, {record['cores']} cores ({', '.join(record['features'])}), {record['date']}. `{record['command']}`"
    )
    notes = "; ".join(f"{label}: {version}" for label, version in versions.items())
    absent = f"\n\nNot installed here: {', '.join(missing)}." if missing else ""
    text = f"# Brim beside its peers on a CPU\n\n{head}\n\nVersions: {notes}.{absent}\n"
    for name, rows in record["models"].items():
        text += f"\n{table(name, rows)}\n"
    options.results.mkdir(parents=True, exist_ok=True)
    stem = options.results / f"peers-cpu-{record['date']}"
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
