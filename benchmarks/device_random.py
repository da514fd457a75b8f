"""Random configurations, each in a process of its own: it starts and survives its worst step, or is refused rightly.

    python benchmarks/device_random.py FIRST_SEED COUNT FOLDER

Prints one JSON line a configuration: its shape and settings, the outcome, the most its process held against its cap. A refused
one is started again with the first setting that the refusal names.
"""

from __future__ import annotations

import json
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from brim import LLM, SamplingParams
from brim.errors import MemoryBudgetError

MODES = ("NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")
MOST_PROMPT_TOKENS = 200_000


def shape(draw: random.Random) -> dict[str, Any]:
    """A config.json."""
    head_dim, kv_heads, group = draw.choice((64, 80, 96, 128, 256)), draw.choice((1, 2, 4)), draw.choice((1, 2, 3, 4, 7, 8))
    family = draw.choice(("llama", "qwen3", "qwen2", "gemma3_text", "mistral"))
    config = {
        "model_type": family,
        "vocab_size": draw.choice((1000, 32_000, 50_257, 128_256, 151_936)),
        "hidden_size": draw.choice((128, 256, 512, 1024)),
        "intermediate_size": draw.choice((256, 704, 2048)),
        "num_hidden_layers": draw.randint(1, 4) if family != "gemma3_text" else 7,
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": draw.random() < 0.5,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }
    if family in ("gemma3_text", "mistral"):
        config["sliding_window"] = draw.choice((64, 500, 1024))
    if family == "gemma3_text":
        config["query_pre_attn_scalar"] = head_dim
    return config


def settings(draw: random.Random) -> dict[str, Any]:
    """Limits, a cap and a graph mode."""
    seqs = draw.choice((1, 2, 7, 32, 100, 256, 512))
    length = draw.choice((64, 300, 1024, 4096, 16_384, 32_768))
    return {
        "max_model_len": length,
        "max_num_seqs": seqs,
        "max_num_batched_tokens": max(seqs, draw.choice((64, 512, 2048, 8192))),
        "memory": draw.choice(("700MiB", "900MiB", "1GiB", "1536MiB", "2GiB", "4GiB", "8GiB")),
        "graph_mode": draw.choice(MODES),
        "arena": draw.choice(("auto", "auto", "auto", "static")),
    }


def serve(llm: LLM, draw: random.Random) -> dict[str, Any]:
    """As many requests of full length as the batch takes, within a bound on the time; all must be answered."""
    limits = llm.config
    length = min(limits.model.max_model_len or 64, 32_768)  # type: ignore[type-var]
    prompt = max(1, int(length) - 8)
    count = max(1, min(limits.scheduler.max_num_seqs or 1, MOST_PROMPT_TOKENS // prompt, 64))
    prompts = [[draw.randrange(2, 999) for _ in range(prompt)] for _ in range(count)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.7, top_p=0.9, max_tokens=8, ignore_eos=True))
    wrong = [output.outputs[0].error for output in outputs if output.outputs[0].error]
    return {"requests": count, "prompt_tokens": prompt, "errors": wrong[:3]}


def attempt(folder: Path, chosen: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Start, serve, close."""
    started = time.perf_counter()
    with LLM(str(folder), load_format="dummy", device="auto", **chosen) as llm:
        ready_s = time.perf_counter() - started
        work = serve(llm, draw)
        memory = llm._core.executor.memory_report()
        return {
            "outcome": "served" if not work["errors"] else "errors",
            "ready_s": round(ready_s, 2),
            "kv_tokens": llm.info["kv_tokens"],
            "cap_bytes": memory["cap_bytes"],
            "held_bytes": memory["resident_bytes"],
            "over_the_cap_bytes": max(memory["resident_bytes"], memory["peak_bytes"]) - memory["cap_bytes"],
            "graph_mode": llm.info["graph_mode"],
            **work,
        }


def changed_by(flags: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """The settings with the flags of a suggestion put in."""
    words = shlex.split(flags)
    return {**chosen, **{words[i][2:].replace("-", "_"): words[i + 1] for i in range(0, len(words), 2)}}


def child(folder: Path, chosen: dict[str, Any], seed: int) -> dict[str, Any]:
    """One attempt in a process of its own."""
    command = [sys.executable, __file__, "attempt", str(folder), json.dumps(chosen), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if lines:
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    return {"outcome": "died", "message": f"exit {done.returncode}: {done.stderr[-500:]}"}


def report(folder: Path, chosen: dict[str, Any], seed: int) -> dict[str, Any]:
    """An attempt, whatever comes of it."""
    try:
        return attempt(folder, chosen, random.Random(seed))
    except MemoryBudgetError as error:
        return {"outcome": "refused", "message": str(error)[:400], "nearest": list(error.nearest)}
    except Exception as error:
        return {"outcome": "failed", "message": f"{type(error).__name__}: {str(error)[:500]}"}


def one(seed: int, root: Path) -> dict[str, Any]:
    """One configuration to its end."""
    draw = random.Random(seed)
    config, chosen = shape(draw), settings(draw)
    folder = root / str(seed)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    found = {"seed": seed, "config": config, "settings": chosen, **child(folder, chosen, seed)}
    if found.get("nearest"):
        again = child(folder, changed_by(found["nearest"][0], chosen), seed)
        found["nearest_outcome"] = again["outcome"]
        found["nearest_over_bytes"] = again.get("over_the_cap_bytes")
        if again["outcome"] != "served":
            found["nearest_message"] = again.get("message")
    return found


def main() -> None:
    """COUNT configurations from FIRST_SEED, or one attempt for that."""
    if sys.argv[1] == "attempt":
        print(json.dumps(report(Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4]))), flush=True)
        return
    first, count, root = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    for seed in range(first, first + count):
        started = time.perf_counter()
        print(json.dumps({**one(seed, root), "seconds": round(time.perf_counter() - started, 1)}), flush=True)


if __name__ == "__main__":
    main()
