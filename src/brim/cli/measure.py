"""The methods of `brim bench`: what exactly is timed. Owns the methods; prints nothing and knows no flags.

- throughput: all requests of a workload at once; output tokens / wall seconds.
- decode: the same prompts for 16 new tokens and for 16 + N; the difference over N is the time of a decode step.
- prefill: one request, one new token, no prefix cache; the median.
- long context: all prompts first, then the mean of decode steps that nothing disturbs.
- beside: sequences that decode while a long prompt is prefilled, against the same sequences alone.
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
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from brim.cli.workloads import Workload, equal_prompts
from brim.engine.sampling_params import SamplingParams
from brim.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from brim.llm import LLM

SHORT_DECODE_TOKENS = 16
SHORT_PROMPT_TOKENS = 128
_SETTLING_STEPS = 8
_SPARE_TOKENS = 64  # what a sequence may get beyond what is timed, while others still start
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


def measure_steady_decode(llm: LLM, *, batch_size: int, input_len: int, output_len: int) -> float:
    """Milliseconds of a decode step over long contexts, undisturbed: the mean over output_len steps.

    Needs prefix caching: each prompt is prefilled alone first, so that all of them then start to decode together.
    """
    most_tokens = input_len + output_len + _SPARE_TOKENS
    _require_context(llm, most_tokens)
    prompts = equal_prompts(batch_size, input_len, llm.info["vocab_size"])
    for prompt in prompts:
        _timed(llm, [prompt], [SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)])
    with _Running(llm, prompts, most_tokens) as running:
        running.until_all_started()
        running.steps(_SETTLING_STEPS)
        return running.steps(output_len) / output_len * 1000


def measure_beside(llm: LLM, *, batch_size: int, input_len: int, output_len: int) -> dict[str, Any]:
    """Time per output token of batch_size sequences, undisturbed over output_len tokens and while a prompt of input_len
    tokens is prefilled beside them; the longest time without a token; how long that prompt took."""
    _require_context(llm, input_len + 1)
    prompts = equal_prompts(batch_size, SHORT_PROMPT_TOKENS, llm.info["vocab_size"])
    with _Running(llm, prompts, llm.info["max_model_len"]) as running:
        running.until_all_started()
        running.steps(_SETTLING_STEPS)
        undisturbed_s = running.steps(output_len) / output_len
        (prompt,) = equal_prompts(1, input_len, llm.info["vocab_size"], seed=1)
        before = running.num_tokens
        seconds, longest_s = running.until_answered(prompt)
        each = max(1.0, (running.num_tokens - before) / batch_size)
    return {
        "ms_per_token": seconds / each * 1000, "undisturbed_ms_per_token": undisturbed_s * 1000,
        "longest_ms": longest_s * 1000, "prefill_ms": seconds * 1000, "tokens_meanwhile": each,
        "batch_size": batch_size, "input_len": input_len,
    }  # fmt: skip


class _Running:
    """Greedy requests driven a step at a time. num_tokens: of all of them so far."""

    def __init__(self, llm: LLM, prompts: Sequence[Sequence[int]], most_tokens: int) -> None:
        self._llm = llm
        self._most_tokens = most_tokens
        self._started: set[str] = set()
        self._ids = {self._add(prompt) for prompt in prompts}
        self.num_tokens = 0

    def __enter__(self) -> _Running:
        return self

    def __exit__(self, *_: object) -> None:
        for request_id in self._ids:
            self._llm.abort_request(request_id)

    def _add(self, prompt: Sequence[int]) -> str:
        count = self._most_tokens - len(prompt)
        params = SamplingParams(temperature=0.0, max_tokens=max(1, count), ignore_eos=True)
        return self._llm.add_request(list(prompt), params)

    def _step(self) -> int:
        """Tokens of the requests of the beginning."""
        count = 0
        for chunk in self._llm.step():
            if chunk.error is not None:
                raise EngineError(f"A measured request failed: {chunk.error}")
            self._started.add(chunk.request_id)
            if chunk.request_id in self._ids:
                count += len(chunk.token_ids)
                if chunk.is_last:
                    raise EngineError("A measured request ended too early; the measurement does not count.")
        self.num_tokens += count
        return count

    def until_all_started(self) -> None:
        """Until each has its first token."""
        while not self._started >= self._ids:
            self._step()

    def steps(self, count: int) -> float:
        """Seconds until each has `count` tokens more."""
        wanted, started = self.num_tokens + count * len(self._ids), time.perf_counter()
        while self.num_tokens < wanted:
            self._step()
        return time.perf_counter() - started

    def until_answered(self, prompt: Sequence[int]) -> tuple[float, float]:
        """Seconds from submitting this prompt beside the others to its first token, and the longest without one of theirs."""
        started = last = time.perf_counter()
        longest_s = 0.0
        new_id = self._add(prompt)
        while new_id not in self._started:
            if self._step():
                now = time.perf_counter()
                longest_s, last = max(longest_s, now - last), now
        ended = time.perf_counter()
        self._llm.abort_request(new_id)
        return ended - started, max(longest_s, ended - last)


def fitting_input_len(llm: LLM, batch_size: int, input_len: int, output_len: int) -> int:
    """input_len, or as much less as it takes for batch_size such sequences to fit the KV cache and the context together."""
    spare, kv = output_len + _SPARE_TOKENS, llm.memory()["kv"]
    block_size = int(kv["block_size"])
    a_sequence = int(kv["kv_tokens"]) // batch_size // block_size * block_size
    return max(1, min(input_len, a_sequence - spare, int(llm.info["max_model_len"]) - spare))


def moves_of(samples: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """First, least and most of samples of (free bytes, bytes held)."""
    found: dict[str, Any] = {"num_samples": len(samples)}
    for name, values in (("free_bytes", [a for a, _ in samples]), ("resident_bytes", [b for _, b in samples])):
        found[name] = {"first": values[0], "least": min(values), "most": max(values)}
    return found


def measure_startup(model: str, settings: dict[str, Any]) -> StartupResult:
    """One fresh process, timed on the clock all processes of the machine share. Raises EngineError with its last words."""
    run = run_engine(model, settings)
    return StartupResult(run.ready_s, run.first_token_s, run.peak_rss_bytes, run.info)


@dataclass(slots=True)
class EngineRun:
    """What an engine in a process of its own said, seconds counted from exec. parts: name -> result; memory: of all that time."""

    ready_s: float = 0.0
    first_token_s: float = 0.0
    peak_rss_bytes: int = 0
    info: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)


def run_engine(
    model: str,
    settings: dict[str, Any],
    parts: Sequence[dict[str, Any]] = (),
    *,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 600.0,
) -> EngineRun:
    """An engine in a fresh process, and the parts it does one after the other (`cli.bench_child`).

    Raises EngineError with its last words where it does not come to its end; one that takes longer is killed.
    """
    task = json.dumps({"model": model, "settings": settings, "parts": list(parts)})
    started, run, failure = time.monotonic(), EngineRun(), ""
    child = subprocess.Popen(
        [sys.executable, "-m", "brim.cli.bench_child", task],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    end = threading.Timer(timeout_s, child.kill)
    end.start()
    assert child.stdout is not None, "its stdout is a pipe"
    try:
        with child.stdout:
            for line in child.stdout:
                if line.startswith("{"):  # a library may print there too
                    failure = _note(run, json.loads(line), started) or failure
        status = child.wait()
    finally:
        child.kill()
        end.cancel()
    if status:
        raise EngineError(f"The measured process ended with {status}: {failure or 'its own output says more'}")
    return run


def _note(run: EngineRun, said: dict[str, Any], started: float) -> str:
    """Take one line of the child; why it failed, where it says so."""
    event = said.pop("event")
    if event == "ready":
        run.ready_s = said["at"] - started
    elif event == "token":
        run.first_token_s, run.info = said["at"] - started, said["info"]
    elif event == "part":
        run.parts[said["name"]] = {**said["result"], "part_s": said["seconds"]}
    elif event == "memory":
        run.memory = said
    elif event == "ended":
        run.peak_rss_bytes = said["peak_rss_bytes"]
    return str(said["message"]) if event == "failed" else ""


def measure_limits(device: str, num_threads: int, **asked: Any) -> dict[str, Any]:
    """What this device can do at best, in a process of its own (`cli.bench_limits`): bandwidth_bytes_per_s and what is asked
    for. Memory is timed over 1 GiB, or less where that is too much. Raises EngineError with its last words."""
    for buffer_bytes in (1 << 30, 1 << 28):
        task = {"device": device, "num_threads": num_threads, "buffer_bytes": buffer_bytes, **asked}
        done = subprocess.run(
            [sys.executable, "-m", "brim.cli.bench_limits", json.dumps(task)], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return found
    last_words = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    raise EngineError(f"The limits of this device could not be measured: {last_words[0]}")


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
