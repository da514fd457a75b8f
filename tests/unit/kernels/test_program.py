"""Recording, the thread pool, and the build."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from brim.errors import BrimError
from brim.kernels.cpu.build import build
from brim.kernels.cpu.kernels import CpuKernels
from brim.kernels.select import select_kernels
from brim.kernels.torch_ref import TorchKernels

from .conftest import library
from .helpers import attention_case


def test_a_program_does_what_direct_calls_do_with_new_inputs(threaded: CpuKernels) -> None:
    tokens, hidden = 6, 64
    cache, batch = attention_case([1] * tokens, [40] * tokens, 1, hidden, torch.bfloat16)
    table = threaded.new_linear(100, hidden, torch.bfloat16)
    table.load_rows(0, torch.randn(100, hidden))
    project = threaded.new_linear(3 * hidden, hidden, torch.bfloat16)
    project.load_rows(0, torch.randn(3 * hidden, hidden) / 8)
    ids, positions = torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens, dtype=torch.int64)
    cos_sin = torch.randn(50, hidden)
    x, qkv, out = (torch.zeros(tokens, w).bfloat16() for w in (hidden, 3 * hidden, hidden))

    def step() -> None:
        threaded.embed(ids, table, 1.0, x)
        threaded.linear(x, project, qkv)
        threaded.rope_and_cache(qkv, positions, cos_sin, cache, batch.slot_mapping, 1)
        threaded.attention(qkv[:, :hidden], cache, batch, 0.1, 0.0, out)

    with threaded.record() as program:
        step()
    assert len(program) == 4
    assert (out == 0).all(), "recording must not run anything"
    for lens in (40, 33):
        ids.copy_(torch.randint(0, 100, (tokens,)))
        positions.fill_(lens - 1)
        batch.seq_lens.fill_(lens)
        program.replay()
        replayed = out.clone()
        out.fill_(float("nan"))
        step()
        assert torch.equal(replayed, out)


def test_calls_from_several_python_threads_are_serialised(threaded: CpuKernels) -> None:
    weight = threaded.new_linear(300, 64, torch.float32)
    weight.load_rows(0, torch.randn(300, 64))
    x = torch.randn(4, 64)
    expected = torch.empty(4, 300)
    threaded.linear(x, weight, expected)
    failures: list[int] = []

    def work() -> None:
        out = torch.empty(4, 300)
        for _ in range(200):
            out.fill_(0)
            threaded.linear(x, weight, out)
            if not torch.equal(out, expected):
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_idle_threads_use_no_processor_time() -> None:
    kernels = CpuKernels(library("native"), num_threads=4)
    kernels.gather_rows(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 4))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.05
    kernels.close()
    kernels.close()
    with pytest.raises(BrimError, match="closed"):
        kernels.gather_rows(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 4))


def test_weights_are_aligned_and_outlive_their_neighbours(threaded: CpuKernels) -> None:
    weights = [threaded.new_linear(n, 40, torch.bfloat16) for n in (1, 70, 3000)]
    for weight in weights:
        assert weight.storage.data_ptr() % 4096 == 0  # type: ignore[attr-defined]
        weight.load_rows(0, torch.ones(weight.out_features, 40))
    last = weights.pop()
    weights.clear()
    assert (last.to_dense() == 1).all()


def test_build_is_found_again_and_survives_concurrent_starts(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from brim.kernels.cpu.build import build
result = build(Path({str(tmp_path)!r}), extra_flags=["-O0"])
assert result.path, result.reason
print(result.built)
"""
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = sorted(run.communicate()[0].strip() for run in runs)
    assert printed == ["False", "False", "True"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".so"]


def test_without_a_compiler_the_reference_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    selection = select_kernels("cpu")
    assert isinstance(selection.kernels, TorchKernels)
    assert selection.fallback_reason is not None and "no C compiler" in selection.fallback_reason


def test_a_failing_compiler_is_reported(tmp_path: Path) -> None:
    result = build(tmp_path, extra_flags=["-include", "no-such-header.h"])
    assert result.path is None
    assert result.reason is not None and "error" in result.reason


def test_selection_prefers_native() -> None:
    selection = select_kernels("cpu", num_threads=1)
    if selection.fallback_reason is not None:
        pytest.skip(selection.fallback_reason)
    assert isinstance(selection.kernels, CpuKernels)
    assert selection.kernels.scratch_bytes > 0
    selection.kernels.close()


def test_importing_the_backend_starts_nothing() -> None:
    code = "import brim.kernels.cpu.kernels, threading; assert threading.active_count() == 1"
    subprocess.run([sys.executable, "-c", code], check=True)
