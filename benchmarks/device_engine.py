"""One engine in this process, driven by a list of workloads; every event is a JSON line. The child of cuda_memory.py.

    python benchmarks/device_engine.py MODEL SETTINGS_JSON WORKLOADS [--hold]

WORKLOADS: comma-separated names of `WORKLOADS`. --hold: after "ready", wait for a line on standard input before working.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from brim import LLM, SamplingParams
from brim.cli.workloads import Workload, equal_prompts, workload_w

VOCAB = 10_000


def emit(event: str, **values: Any) -> None:
    """One line, at once."""
    print(json.dumps({"event": event, "time": time.time(), **values}), flush=True)


def run(llm: LLM, work: Workload) -> tuple[float, list[list[int]]]:
    """Seconds and tokens of each request."""
    params = [SamplingParams(temperature=work.temperature, max_tokens=n, ignore_eos=True) for n in work.num_new_tokens]
    prompts = [list(prompt) for prompt in work.prompts]
    started = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - started
    wrong = [output.outputs[0].error for output in outputs if output.outputs[0].error]
    if wrong:
        emit("errors", count=len(wrong), first=wrong[0])
    return seconds, [output.outputs[0].token_ids for output in outputs]


def same(batch: int, length: int, new_tokens: int) -> Workload:
    """`batch` greedy requests of one length."""
    prompts = equal_prompts(batch, length, VOCAB)
    return Workload(f"{batch} x {length}", prompts, (new_tokens,) * batch, 0.0)


def throughput(llm: LLM, work: Workload) -> dict[str, Any]:
    """Output tokens a second, and what is needed to compare tokens."""
    seconds, tokens = run(llm, work)
    count = sum(map(len, tokens))
    return {"seconds": seconds, "output_tokens": count, "tokens_per_s": count / seconds, "checksum": checksum(tokens)}


def checksum(tokens: list[list[int]]) -> int:
    """Of all tokens in order."""
    total = 0
    for row in tokens:
        for token in row:
            total = (total * 1_000_003 + token + 1) % (1 << 61)
    return total


def mixed_greedy(llm: LLM) -> dict[str, Any]:
    """The tokens themselves of 16 prompts of 5 to 700 tokens, 48 new ones each."""
    rng = np.random.default_rng(11)
    prompts = [rng.integers(5, 900, int(length)).tolist() for length in rng.integers(5, 700, 16)]
    scored = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, logprobs=2))
    plain = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=48, ignore_eos=True))
    gaps = [[p.top[0].logprob - p.top[1].logprob for p in output.outputs[0].logprobs or []] for output in scored]
    tokens = [[output.outputs[0].token_ids for output in outputs] for outputs in (plain, scored)]
    return {"tokens": tokens[0], "scored": tokens[1], "gaps": gaps}


WORKLOADS: dict[str, Callable[[LLM], dict[str, Any]]] = {
    "w": lambda llm: throughput(llm, workload_w(VOCAB)),
    "long": lambda llm: throughput(llm, same(64, 8000, 16)),
    "greedy": lambda llm: throughput(llm, same(64, 200, 200)),
    "mixed": mixed_greedy,
}


def main() -> None:
    """Start, say so, work, say so, end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("settings")
    parser.add_argument("workloads")
    parser.add_argument("--hold", action="store_true")
    args = parser.parse_args()
    phases: list[str] = []

    def progress(step: Any) -> None:
        if step.phase not in phases:
            phases.append(step.phase)
            emit("phase", phase=step.phase)
        elif step.phase == "warm":
            emit("text", text=step.text)

    try:
        llm = LLM(args.model, on_progress=progress, **json.loads(args.settings))
    except Exception as error:
        nearest = list(getattr(error, "nearest", ()))
        emit("refused", kind=type(error).__name__, message=str(error)[:2000], nearest=nearest)
        sys.exit(3)
    executor = llm._core.executor
    emit("ready", info={k: v for k, v in llm.info.items() if k != "startup_report"}, report=executor.memory_report())
    if args.hold:
        sys.stdin.readline()
    for name in filter(None, args.workloads.split(",")):
        emit("work", name=name)
        result = WORKLOADS[name](llm)
        emit("done", name=name, result=result, stats=llm._core.stats(), held_bytes=executor.memory_report()["resident_bytes"])
    llm.close()
    emit("closed")


if __name__ == "__main__":
    main()
