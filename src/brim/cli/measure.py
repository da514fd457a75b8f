"""The methods of `brim bench`: what exactly is timed. Owns the methods; prints nothing and knows no flags.

- throughput: all requests of a workload at once; output tokens / wall seconds.
- decode: the same prompts for 16 new tokens and for 16 + N; the difference over N is the time of a decode step.
- prefill: one request, one new token, no prefix cache; the median.
- startup: a fresh process, from exec to ready and to its first token.

The memory-bandwidth limit of decode: a step must read every weight it uses and the cached keys and values of its sequences.
Worked example: 536 MB of weights and 3 MB of KV at 52.9 GB/s are 10.2 ms; a step of 14.6 ms reaches 0.70 of the limit.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from brim.cli.workloads import Workload, equal_prompts
from brim.engine.sampling_params import SamplingParams
from brim.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from brim.llm import LLM

SHORT_DECODE_TOKENS = 16
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class StartupResult:
    """Seconds from exec of a fresh process; peak_rss_bytes of that process; info is its `LLM.info`."""

    ready_s: float
    first_token_s: float
    peak_rss_bytes: int
    info: dict[str, Any]


def measure_throughput(llm: LLM, workload: Workload) -> tuple[float, float]:
    """(output tokens per second, wall seconds) of the whole workload, submitted at once."""
    params = [
        SamplingParams(temperature=workload.temperature, max_tokens=count, ignore_eos=True, seed=index)
        for index, count in enumerate(workload.num_new_tokens)
    ]
    longest = max(len(p) + n for p, n in zip(workload.prompts, workload.num_new_tokens, strict=True))
    _require_context(llm, longest)
    seconds = _timed(llm, workload.prompts, params)
    return workload.num_output_tokens / seconds, seconds


def measure_decode(llm: LLM, *, batch_size: int, input_len: int, output_len: int, num_iters: int, say: Say) -> float:
    """Milliseconds of a decode step at batch_size: the median over num_iters of (t(16 + output_len) - t(16)) / output_len."""
    _require_context(llm, input_len + SHORT_DECODE_TOKENS + output_len)
    prompts = equal_prompts(batch_size, input_len, llm.info["vocab_size"])
    short = SamplingParams(temperature=0.0, max_tokens=SHORT_DECODE_TOKENS, ignore_eos=True)
    long = SamplingParams(temperature=0.0, max_tokens=SHORT_DECODE_TOKENS + output_len, ignore_eos=True)
    _timed(llm, prompts, [short] * batch_size)
    results = []
    for index in range(num_iters):
        short_s = _timed(llm, prompts, [short] * batch_size)
        long_s = _timed(llm, prompts, [long] * batch_size)
        results.append((long_s - short_s) / output_len * 1000)
        say(f"decode, batch {batch_size}, {index + 1} of {num_iters}: {results[-1]:.2f} ms")
    return statistics.median(results)


def measure_prefill(llm: LLM, *, input_len: int, num_iters: int, say: Say) -> float:
    """Milliseconds from one prompt of input_len tokens to its first new token: the median over num_iters, after one to warm."""
    _require_context(llm, input_len + 1)
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    results = []
    for index in range(num_iters + 1):
        prompts = equal_prompts(1, input_len, llm.info["vocab_size"], seed=index)
        results.append(_timed(llm, prompts, [params]) * 1000)
        say(f"prefill of {input_len}, {index} of {num_iters}: {results[-1]:.1f} ms")
    return statistics.median(results[1:])


def measure_startup(model: str, settings: dict[str, Any]) -> StartupResult:
    """One fresh process, timed on the clock all processes of the machine share. Raises EngineError with its last words."""
    started = time.monotonic()
    command = [sys.executable, "-m", "brim.cli.startup_probe", json.dumps({"model": model, "settings": settings})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last_words = done.stderr.strip().splitlines()[-1:] or ["(it said nothing)"]
        raise EngineError(f"The measured process ended with {done.returncode}: {last_words[0].removeprefix('brim: ')}")
    said = json.loads(done.stdout.splitlines()[-1])
    return StartupResult(said["ready_at"] - started, said["token_at"] - started, said["peak_rss_bytes"], said["info"])


def measure_bandwidth(device: str, num_threads: int) -> float:
    """Bytes per second that reading memory reaches here, in a process of its own (1 GiB, or less where that is too much)."""
    for buffer_bytes in (1 << 30, 1 << 28):
        arguments = [device, str(num_threads), str(buffer_bytes)]
        done = subprocess.run(
            [sys.executable, "-m", "brim.cli.bandwidth_probe", *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return float(done.stdout)
    last_words = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    raise EngineError(f"The memory bandwidth could not be measured: {last_words[0]}")


def kv_read_bytes(kv: dict[str, Any], first_position: int, num_steps: int) -> int:
    """Bytes of cached keys and values that one sequence reads in a step, the mean over num_steps from first_position.

    `kv` is that part of `LLM.memory()`. A group reads block_bytes / block_size for each cached token, a sliding group at most
    for its window.
    """
    total: int = 0
    for position in range(first_position, first_position + num_steps):
        total += sum(min(position, group["window"] or position) * group["block_bytes"] for group in kv["groups"])
    return total // (int(kv["block_size"]) * max(1, num_steps))


def weight_read_bytes(info: dict[str, Any]) -> int:
    """Bytes of weights that one decode step reads: all, less an embedding table that is not the output matrix too."""
    return int(info["weight_bytes"]) - int(info.get("embedding_only_bytes", 0))


def num_engine_threads(info: dict[str, Any]) -> int:
    """Threads the engine computes with, by its own account; all the process may use where it does not say."""
    return int(info.get("num_threads") or len(os.sched_getaffinity(0)))


def _timed(llm: LLM, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> float:
    """Wall seconds of one `generate`; raises EngineError unless every request got exactly the tokens it asked for."""
    requests = [list(prompt) for prompt in prompts]
    started = time.perf_counter()
    outputs = llm.generate(requests, list(params))
    seconds = time.perf_counter() - started
    for output, wanted in zip(outputs, params, strict=True):
        got = len(output.outputs[0].token_ids)
        if got != wanted.max_tokens:
            raise EngineError(f"A request got {got} of {wanted.max_tokens} tokens; the measurement does not count.")
    return seconds


def _require_context(llm: LLM, num_tokens: int) -> None:
    limit = llm.info["max_model_len"]
    if num_tokens > limit:
        raise ConfigError(f"This measurement needs a context of {num_tokens} tokens and the engine has {limit}; "
                          f"give --max-model-len {num_tokens}, or a smaller --input-len or --output-len.")  # fmt: skip
