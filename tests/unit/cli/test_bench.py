"""`brim bench`: the methods, and the form of the result."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from tests.unit.cli.conftest import MIB, Brim, FakeLLM

from brim.cli import measure
from brim.cli.measure import StartupResult, kv_read_bytes, measure_decode
from brim.engine.sampling_params import SamplingParams
from brim.errors import EngineError

PROMISED = {"output_tokens_per_s", "decode_ms_per_token", "prefill_ms", "ready_s", "kv_tokens", "limit_share", "device",
            "versions", "command"}  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, fake_llm: FakeLLM) -> FakeLLM:
    """Time as the fake engine spends it: 100 ms a prompt and 10 ms a new token of the longest request. 100 MB/s of bandwidth."""
    now = [0.0]
    answer = fake_llm.generate

    def generate(prompts: list[Any], params: Any, *, use_tqdm: bool = False) -> list[Any]:
        each = params if isinstance(params, list) else [params]
        now[0] += 0.1 * len(prompts) + 0.01 * max(one.max_tokens or 0 for one in each)
        return answer(prompts, params)

    monkeypatch.setattr(fake_llm, "generate", generate)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measure, "measure_limits", lambda *_: {"bandwidth_bytes_per_s": 100 * 512.0 * MIB})
    return fake_llm


def result_of(brim_command: Brim, *arguments: str) -> dict[str, Any]:
    ended = brim_command("bench", *arguments, "--model", "demo", "--json")
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    assert found.keys() >= PROMISED
    assert found["command"] == f"brim bench {' '.join(arguments)} --model demo --json"
    assert (found["device"], found["kv_tokens"]) == ("a fake", 65536)
    return found


def test_decode_is_the_difference_over_the_steps(brim_command: Brim, clock: FakeLLM) -> None:
    found = result_of(brim_command, "decode", "--batch-size", "2", "--batch-size", "4", "--output-len", "32")
    assert found["decode_ms_per_token"] == pytest.approx(10.0)
    assert [step["batch_size"] for step in found["decode"]["by_batch"]] == [2, 4]
    lengths = [params.max_tokens for _, params in clock.asked]
    assert lengths == ([16] * 2 + ([16] * 2 + [48] * 2) * 3) + ([16] * 4 + ([16] * 4 + [48] * 4) * 3)
    assert all(params.ignore_eos for _, params in clock.asked)


def test_the_share_of_the_limit_counts_weights_and_cached_tokens(brim_command: Brim, clock: FakeLLM) -> None:
    found = result_of(brim_command, "decode", "--input-len", "16", "--output-len", "64", "--num-iters", "1")
    read = 512 * MIB + (32 + 95) * 100 // 2 + sum(min(p, 64) * 10 for p in range(32, 96)) // 64
    assert found["decode_read_bytes"] == pytest.approx(read, abs=1)
    assert found["limit_share"] == pytest.approx(read / (100 * 512 * MIB) / 0.010)


def test_prefill_is_the_median_of_one_token_requests(brim_command: Brim, clock: FakeLLM) -> None:
    found = result_of(brim_command, "prefill", "--input-len", "40", "--num-iters", "3")
    assert found["prefill_ms"] == pytest.approx(110.0)
    assert [(len(prompt), params.max_tokens) for prompt, params in clock.asked] == [(40, 1)] * 4
    assert len({tuple(prompt) for prompt, _ in clock.asked}) == 4


def test_throughput_submits_workload_w_at_once(brim_command: Brim, clock: FakeLLM) -> None:
    found = result_of(brim_command, "throughput", "--num-seqs", "5")
    tokens, seconds = found["throughput"]["output_tokens"], found["throughput"]["seconds"]
    assert found["output_tokens_per_s"] == pytest.approx(tokens / seconds)
    assert {params.temperature for _, params in clock.asked} == {0.6}
    assert len(clock.asked) == 5


@pytest.mark.parametrize(("flags", "caching"), [((), False), (("--enable-prefix-caching",), True)])
def test_prefix_caching_is_off_unless_asked_for(
    brim_command: Brim, clock: FakeLLM, flags: tuple[str, ...], caching: bool
) -> None:
    result_of(brim_command, "prefill", *flags)
    assert clock.opened_with[1]["enable_prefix_caching"] is caching


def test_startup_is_the_median_of_fresh_processes_and_written_to_a_file(
    brim_command: Brim, clock: FakeLLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    starts = iter((3.0, 2.0, 2.5))
    monkeypatch.setattr(
        measure, "measure_startup", lambda model, settings: StartupResult(next(starts), 4.0, 700 * MIB, clock.info)
    )
    path = tmp_path / "startup.json"
    found = result_of(brim_command, "startup", "--output", str(path))
    assert (found["ready_s"], found["first_token_s"], found["peak_rss_bytes"]) == (2.5, 4.0, 700 * MIB)
    assert json.loads(path.read_text()) == found


def test_the_table_shows_what_was_measured(brim_command: Brim, clock: FakeLLM) -> None:
    ended = brim_command("bench", "decode", "--model", "demo", "--batch-size", "1", "--batch-size", "8")
    rows = {line.split("  ")[0]: line for line in ended.out.splitlines()}
    assert "10.00 ms" in rows["decode"]
    assert "10.00 ms" in rows["decode at batch 8"]
    assert "throughput" not in rows
    assert "brim bench decode" in rows["command"]


def test_a_context_too_short_is_said_before_anything_runs(brim_command: Brim, clock: FakeLLM) -> None:
    ended = brim_command("bench", "prefill", "--model", "demo", "--input-len", "8000")
    assert (ended.code, clock.asked) == (1, [])
    assert "--max-model-len 8001" in ended.err


def test_a_request_that_ended_early_does_not_count(fake_llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = fake_llm.generate
    short = SamplingParams(max_tokens=2, ignore_eos=True)
    monkeypatch.setattr(fake_llm, "generate", lambda prompts, params: answer(prompts, [short] * len(prompts)))
    with pytest.raises(EngineError, match="2 of 16 tokens"):
        measure_decode(fake_llm, batch_size=1, input_len=4, output_len=4, num_iters=1, say=print)  # type: ignore[arg-type]


@pytest.mark.parametrize(("first", "steps", "expected"), [(10, 1, 1100), (64, 1, 7040), (100, 1, 10640), (10, 2, 1155)])
def test_a_sliding_group_is_read_for_its_window_only(first: int, steps: int, expected: int) -> None:
    groups = [{"window": 0, "block_bytes": 1600}, {"window": 64, "block_bytes": 160}]
    assert kv_read_bytes({"block_size": 16, "groups": groups}, first, steps) == expected


def test_a_start_that_fails_is_told_with_its_last_words() -> None:
    with pytest.raises(EngineError, match=r"ended with 1: .*no-such-model"):
        measure.measure_startup("./no-such-model", {})


def test_limits_are_measured_in_a_process_of_its_own_over_less_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append((command[2], json.loads(command[3])["buffer_bytes"]))
        return subprocess.CompletedProcess(command, 0 if len(asked) == 2 else -9, '{"bandwidth_bytes_per_s": 5e9}\n', "")

    monkeypatch.setattr(subprocess, "run", run)
    assert measure.measure_limits("cpu", 2)["bandwidth_bytes_per_s"] == 5e9
    assert asked == [("brim.cli.bench_limits", size) for size in (1 << 30, 1 << 28)]


class Stepped:
    """An engine of steps: a decode step takes 10 ms, one that prefills `chunk` tokens of a prompt beside takes 30."""

    info: ClassVar[dict[str, Any]] = {"max_model_len": 4096, "vocab_size": 1000}

    def __init__(self, now: list[float], chunk: int) -> None:
        self._now, self._chunk = now, chunk
        self._left: dict[str, int] = {}

    def memory(self) -> dict[str, Any]:
        return {"kv": {"kv_tokens": 8192, "block_size": 16}}

    def add_request(self, prompt_ids: list[int], params: SamplingParams) -> str:
        request_id = f"r{len(self._left)}"
        self._left[request_id] = len(prompt_ids)
        return request_id

    def abort_request(self, request_id: str) -> None:
        self._left.pop(request_id, None)

    def step(self) -> list[Any]:
        waiting = [name for name, left in self._left.items() if left > 0]
        self._now[0] += 0.03 if waiting else 0.01
        chunks = [name for name, left in self._left.items() if left <= 0]
        for name in waiting[:1]:
            self._left[name] -= self._chunk
            chunks += [name] if self._left[name] <= 0 else []
        return [SimpleNamespace(request_id=n, token_ids=[7], is_last=False, error=None) for n in chunks]


def test_beside_a_prompt_tokens_come_as_often_as_steps_do(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    llm: Any = Stepped(now, chunk=1000)
    found = measure.measure_beside(llm, batch_size=2, input_len=4000, output_len=20)
    assert found["undisturbed_ms_per_token"] == pytest.approx(10)
    assert found["ms_per_token"] == pytest.approx(30)
    assert (found["prefill_ms"], found["tokens_meanwhile"]) == (pytest.approx(120), 4)
    assert found["longest_ms"] == pytest.approx(30)


@pytest.mark.parametrize(("asked", "batch", "expected"), [(100, 2, 100), (5000, 2, 4096 - 84), (5000, 4, 2048 - 84)])
def test_long_prompts_are_cut_to_what_the_cache_holds(asked: int, batch: int, expected: int) -> None:
    llm: Any = Stepped([0.0], chunk=1)
    assert measure.fitting_input_len(llm, batch, asked, 20) == expected
