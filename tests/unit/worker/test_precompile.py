"""Kernels compiled ahead: every variant any step needs is known, other processes make it, nothing of that can fail a start."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget

from brim.config.model_spec import spec_from_hf_config
from brim.errors import DeviceError
from brim.kernels.torch_ref import TorchKernels
from brim.kernels.triton.cache_folder import replace_unwritable_cache
from brim.kernels.triton.compile_pool import CompilePool
from brim.kernels.triton.variant import Variant
from brim.memory.kv_layout import KVLayout
from brim.memory.step_memory import StepLimits
from brim.worker.precompile import compile_ahead
from brim.worker.variants import candidates

TARGET = GPUTarget("cuda", 90, 32)
PROCESS = (sys.executable, "-m", "brim.kernels.triton.compile_process")
ECHO = "import sys, time\nfor i, line in enumerate(sys.stdin):\n    if i:\n        {body}\n        print(flush=True)\n"


@dataclass(frozen=True)
class FakeVariant:
    """What the pool asks of a variant."""

    text: str
    cached: bool = False

    @property
    def kernel(self) -> str:
        return self.text

    @property
    def cost_rank(self) -> tuple[int, int]:
        return 0, 0

    def is_cached(self, target: GPUTarget) -> bool:
        if self.text == "unreadable":
            raise PermissionError("no")
        return self.cached


def pool(variants: list[FakeVariant], body: str = "pass", **settings: Any) -> CompilePool:
    command = settings.pop("command", (sys.executable, "-c", ECHO.format(body=body)))
    return CompilePool(variants, TARGET, command=command, **settings)  # type: ignore[arg-type]


def variants(count: int, **flags: Any) -> list[FakeVariant]:
    return [FakeVariant(f"v{i}", **flags) for i in range(count)]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


def without_interpreter(**more: str) -> dict[str, str]:
    return {**{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}, **more}


def run_check(*arguments: str, **environment: str) -> None:
    command = (sys.executable, "-m", "tests.unit.worker.variant_checks", *arguments)
    done = subprocess.run(
        command, env=without_interpreter(**environment), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "qwen2"])
def test_every_step_of_a_worker_needs_rehearsed_variants_only(family: str) -> None:
    run_check("steps", family, VARIANT_EXAMPLES="40")


def test_every_shape_needs_rehearsed_variants_only() -> None:
    run_check("shapes")


def test_what_other_processes_compile_is_what_a_launch_looks_for(tmp_path: Path) -> None:
    run_check("cache", "gemma3", TRITON_CACHE_DIR=str(tmp_path / "cache"))


def test_a_kernels_place_in_the_cache_does_not_depend_on_which_was_met_first() -> None:
    """Two that call the same function, which reads a global value."""
    code = """
import sys
from brim.kernels.triton import skinny
from brim.kernels.triton.variant import settle_key
kernels = [skinny.skinny_product_kernel, skinny.vector_product_kernel]
for kernel in kernels[:: int(sys.argv[1])]:
    settle_key(kernel)
print(*(kernel.cache_key for kernel in kernels))
"""
    found = {
        subprocess.run(
            [sys.executable, "-c", code, order], env=without_interpreter(), capture_output=True, text=True, check=True
        ).stdout
        for order in ("1", "-1")
    }
    assert len(found) == 1


def test_all_are_compiled_over_all_processes() -> None:
    report = pool(variants(20), num_processes=3).wait()
    assert (report.num_variants, report.num_cached, report.num_compiled, report.failures) == (20, 0, 20, ())
    assert "20 compiled" in report.text


def test_how_far_it_is_can_be_told() -> None:
    told: list[tuple[int, int]] = []
    job = pool(variants(6), "time.sleep(0.2)", num_processes=2)
    job.wait(lambda done, all_: told.append((done, all_)))
    assert len(told) > 1
    assert told == sorted(told)
    assert {all_ for _, all_ in told} == {6}


def test_where_all_is_cached_no_process_starts() -> None:
    report = pool(variants(5, cached=True), command=("/nowhere/python",)).wait()
    assert (report.num_cached, report.num_compiled, report.failures) == (5, 0, ())


@pytest.mark.parametrize(
    ("body", "words"),
    [("sys.exit(3)", "ended"), ("raise SystemError", "ended"), ("print('ptxas died'); continue", "ptxas died")],
)
def test_processes_that_fail_are_reported_only(body: str, words: str) -> None:
    report = pool(variants(6), body, num_processes=2).wait()
    assert report.num_compiled == 0 and words in report.failures[0] and words in report.text


def test_a_process_that_ends_leaves_the_rest_to_the_others() -> None:
    report = pool(variants(30), "sys.exit() if 'v7\"' in line else time.sleep(0.01)", num_processes=2).wait()
    assert report.num_compiled == 29 and len(report.failures) == 1


def test_no_process_at_all_and_a_cache_that_cannot_be_read() -> None:
    report = pool([FakeVariant("unreadable")], command=("/nowhere/python",)).wait()
    assert report.num_compiled == 0 and "PermissionError" in report.failures[0] and "/nowhere" in report.failures[1]


def test_waiting_has_an_end_and_closing_too() -> None:
    hung = pool(variants(4), "time.sleep(60)", num_processes=2, time_limit_s=0.3)
    started = time.monotonic()
    assert "time limit" in hung.wait().failures[0]
    closed = pool(variants(4), "time.sleep(60)", num_processes=2)
    assert within(10, lambda: len(closed._processes) == 2)
    closed.close()
    closed.close()
    assert all(process.returncode is not None for process in closed._processes)
    assert time.monotonic() - started < 15


def test_a_process_ends_with_its_parent() -> None:
    code = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen({PROCESS!r}, stdin=subprocess.PIPE)\nprint(p.pid, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_running(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert within(10, lambda: not is_running(pid))


def test_the_processes_import_no_torch() -> None:
    code = (
        "import sys, brim.kernels.triton.compile_process\n"
        "from brim.kernels.triton import decode_attention, dense, logprobs, matmul, prefill_attention, rope, sampling, tokens\n"
        "from brim.kernels.triton import hopper_attention, skinny\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], env=without_interpreter(), check=True)


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """The process answers, the pool reports; the kernels themselves move to a folder that can be, or say what to do."""
    (tmp_path / "file").touch()
    text = '{"module": "brim.kernels.triton.tokens", "kernel": "resolve_ids_kernel", "signature": {}, "constants": [], "attributes": [], "options": {}}'  # noqa: E501
    code = (
        "from triton.backends.compiler import GPUTarget\nfrom brim.kernels.triton.compile_pool import CompilePool\n"
        f"from brim.kernels.triton.variant import Variant\nimport os\n"
        f"report = CompilePool([Variant({text!r})], GPUTarget('cuda', 90, 32)).wait()\n"
        "assert report.num_compiled == 0 and report.failures, report\n"
        "from brim.kernels.triton.cache_folder import replace_unwritable_cache\n"
        "made = replace_unwritable_cache()\n"
        "assert made is not None and os.environ['TRITON_CACHE_DIR'] == made.name\n"
        "assert replace_unwritable_cache() is None\n"
    )
    env = without_interpreter(TRITON_CACHE_DIR=str(tmp_path / "file" / "cache"))
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_no_folder_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert replace_unwritable_cache() is None  # compiled before, kernels need no temporary folder
    monkeypatch.setenv("TRITON_CACHE_DIR", "/dev/null/cache")
    with pytest.raises(DeviceError, match="TRITON_CACHE_DIR"):
        replace_unwritable_cache()


def test_kernels_that_compile_nothing_and_kernels_that_cannot_be_rehearsed() -> None:
    spec = spec_from_hf_config(
        {"model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    )  # fmt: skip
    limits = StepLimits(4, 64, 64)

    class Broken(TorchKernels):
        def rehearsal(self) -> None:
            raise DeviceError("no such device")

    layout = KVLayout.of(spec, 16, 4)
    nothing = compile_ahead(TorchKernels("cpu"), spec, limits, layout, torch.float32)
    assert nothing.steps == () and nothing.job is None and nothing.wait().failures == ()
    nothing.close()
    broken = compile_ahead(Broken("cpu"), spec, limits, layout, torch.float32)
    assert broken.steps == () and "no such device" in broken.wait().text


def test_candidates_keep_the_limits() -> None:
    for limits in (StepLimits(1, 1, 1), StepLimits(1, 70, 9), StepLimits(70, 70, 1), StepLimits(256, 8192, 131072)):
        steps = list(candidates(limits, 4))
        assert len(steps) < 200
        for step in steps:
            assert len(step.query_lens) <= limits.max_num_seqs and max(step.query_lens) <= limits.max_model_len
            assert step.num_tokens <= step.padded_tokens <= limits.max_num_tokens and min(step.query_lens) >= 1
            assert max(step.query_lens) <= step.max_query_len <= limits.max_num_tokens


def test_variants_sort_by_what_they_cost() -> None:
    def text(kernel: str) -> str:
        return f'{{"kernel": "{kernel}", "options": {{"num_warps": 4}}}}'

    order = sorted([Variant(text("gather_kernel")), Variant(text("prefill_attention_kernel"))], key=lambda v: v.cost_rank)
    assert [variant.kernel for variant in order] == ["prefill_attention_kernel", "gather_kernel"]
