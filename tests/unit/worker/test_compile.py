"""--compile: the same results as call by call in every graph mode, nothing of compiling charged to KV, and doing without."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tests.small_models import write_small_model
from tests.unit.worker.test_graph_modes import (
    LENGTH,
    SEQS,
    TOKENS,
    StoredKernels,
    StoringPlatform,
    run,
)
from torch import Tensor

from brim.config.model_source import open_model
from brim.config.resolve import resolve
from brim.config.schema import GraphMode
from brim.errors import ConfigError, DeviceLost
from brim.kernels.compiler import DenseCompiler, compile_reason
from brim.kernels.plain_weights import PlainWeightKernels
from brim.kernels.select import select_kernels
from brim.kernels.torch_ref import TorchKernels
from brim.models.compiled import CompiledDecoder
from brim.models.dense_stretch import DenseForm, Stretch, begin_body, layer_body
from brim.platforms.base import Platform
from brim.platforms.fake import FakeDevice, FakePlatform
from brim.runtime import build_engine_core
from brim.units import MIB
from brim.worker.device_worker import DeviceWorker
from brim.worker.startup import start_worker

MODES = get_args(GraphMode)
BASE = {"load_format": "dummy", "dtype": "float32", "max_model_len": LENGTH, "max_num_seqs": SEQS}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # of the compiler's own code
]


class StoringBackend:
    """Compiles to the traced graph itself, whose calls can be stored as those of kernels are."""

    def __init__(self, kernels: StoredKernels) -> None:
        self._kernels = kernels
        self.graphs: list[Any] = []

    def __call__(self, graph: Any, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(graph)

        def call(*args: Any) -> Any:
            self._kernels.num_calls += 1
            if self._kernels.storing is not None:
                self._kernels.storing.append((lambda _, *stored: graph(*stored), args, {}))
                return ()
            return graph(*args)

        return call


def start(model: Path, platform: Platform, kernels: Any, backend: Any, **settings: Any) -> DeviceWorker:
    flags = {**BASE, "model": str(model), "max_num_batched_tokens": TOKENS, "memory": "1200MiB", "compile": "true", **settings}
    config = resolve(flags)
    return start_worker(config, platform, lambda _: kernels, open_model(config.model), lambda _: None, backend)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family with the most kinds of norms, and two KV groups."""
    return write_small_model(tmp_path_factory.mktemp("models") / "gemma3", "gemma3")


@pytest.fixture(scope="module")
def eager(model: Path) -> list[list[int]]:
    kernels = StoredKernels()
    worker = start(model, StoringPlatform(kernels, False), kernels, "eager", compile="false", enforce_eager=True)
    assert worker.ready.warm.compiling.text == "off: not asked for"
    tokens = run(worker)
    worker.close()
    return tokens


@pytest.mark.parametrize("mode", MODES)
def test_every_graph_mode_gives_the_tokens_of_eager_steps(mode: GraphMode, model: Path, eager: list[list[int]]) -> None:
    kernels = StoredKernels()
    backend = StoringBackend(kernels)
    worker = start(model, StoringPlatform(kernels, False), kernels, backend, graph_mode=mode)
    assert worker.ready.warm.compiling.text == "on: custom"
    assert (worker.num_programs > 0) == (mode != "NONE")
    compiled = len(backend.graphs)
    assert compiled == 1 + 3 * 2  # the try, then three stretches, each for one token and for several
    before = kernels.num_calls
    assert run(worker) == eager
    assert len(backend.graphs) == compiled, "compiled again while serving"
    if mode == "FULL":
        assert kernels.num_calls - before < 300
    worker.close()


def test_another_backend_gives_the_tokens_of_eager_steps(model: Path, eager: list[list[int]]) -> None:
    """One that traces, turns writes into values and back, and compiles nothing: it works wherever torch does."""
    kernels = StoredKernels()
    worker = start(model, StoringPlatform(kernels, False), kernels, "aot_eager", graph_mode="NONE")
    assert worker.ready.warm.compiling.text == "on: aot_eager"
    assert run(worker) == eager
    worker.close()


def test_inductor_gives_the_tokens_of_eager_steps_or_says_why_not(model: Path, eager: list[list[int]]) -> None:
    """Where it compiles, on the native kernels' side of a host too; where it cannot, the same tokens call by call."""
    works = DenseCompiler().try_out(torch.device("cpu")) is None
    kernels = StoredKernels()
    worker = start(model, StoringPlatform(kernels, False), kernels, "inductor", graph_mode="NONE")
    assert worker.ready.warm.compiling.text.startswith("on: inductor" if works else "off: ")
    assert run(worker) == eager
    worker.close()


def test_weights_are_held_once(model: Path) -> None:
    kernels = StoredKernels()
    worker = start(model, StoringPlatform(kernels, False), kernels, "aot_eager", graph_mode="NONE")
    built = worker.ready.warm.reserved.loaded.model
    assert isinstance(built, CompiledDecoder)
    shared = {segment.run.args[0] for segment in built.segments if not segment.is_attention}  # type: ignore[attr-defined]
    assert len(shared) == 3
    for stretch_args in (segment.run.args for segment in built.segments if not segment.is_attention):  # type: ignore[attr-defined]
        for weight in stretch_args[1]:
            held = built.weights
            ours = [held.final_norm, *(value for layer in held.layers for value in _tensors(layer))]
            assert weight is None or any(weight is one for one in ours)
    worker.close()


def _tensors(layer: Any) -> Iterator[Tensor]:
    for name in layer.__slots__:
        value = getattr(layer, name)
        if value is not None:
            yield value if isinstance(value, Tensor) else value.storage


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sandwich", [False, True])
def test_stretches_match_the_reference(backend: str, dtype: torch.dtype, sandwich: bool) -> None:
    if backend == "inductor" and (reason := DenseCompiler().try_out(torch.device("cpu"))) is not None:
        assert reason and "\n" not in reason  # what a start does then is tested below
        return
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int, gain: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) * gain).to(of)

    width, queries, inner, most = 64, 48, 96, 40
    form = DenseForm(1e-6, "gelu_tanh" if sandwich else "silu", inner)
    begin, layer = Stretch(begin_body(form), DenseCompiler(backend), 2), Stretch(layer_body(form), DenseCompiler(backend), 3)
    norms = [random(width, of=torch.float32) if sandwich or i < 2 else None for i in range(4)]
    biases = [None if sandwich else random(n, of=torch.float32) for n in (width, 2 * inner, width, queries)]
    matrices = [random(*shape, gain=0.1) for shape in ((width, queries), (2 * inner, width), (width, inner), (queries, width))]
    storage = torch.zeros(most * (2 * queries + 2 * width), dtype=dtype)  # one workspace, as in a worker
    sizes = (queries, width, queries, width)
    starts = [most * sum(sizes[:i]) for i in range(4)]
    attended, residual, qkv, hidden = (storage[a : a + most * w].view(most, w) for a, w in zip(starts, sizes, strict=True))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for count in (most, 1, 2, 3, 17, 32):
        for tensor in (attended, residual):
            tensor.copy_(random(most, tensor.shape[1]))
        wanted_residual, wanted_qkv = residual[:count].clone(), qkv[:count].clone()
        args = (matrices[0], biases[0], norms[2], norms[0], matrices[1], biases[1], matrices[2], biases[2], norms[3], norms[1],
                matrices[3], biases[3])  # fmt: skip
        _reference(form, attended[:count], wanted_residual, wanted_qkv, *args)
        untouched = residual[count:].clone()
        layer(attended[:count], residual[:count], qkv[:count], *args)
        _close(residual[:count], wanted_residual, tolerance)
        _close(qkv[:count], wanted_qkv, tolerance)
        assert torch.equal(residual[count:], untouched)
        begin(residual[:count], qkv[:count], norms[0], matrices[3], biases[3])
        kernels, wanted = TorchKernels(), torch.empty_like(wanted_qkv)
        kernels.rms_norm(residual[:count], norms[0], form.eps, hidden[:count])  # type: ignore[arg-type]
        kernels.linear(hidden[:count], _weight(kernels, matrices[3]), wanted, biases[3])
        _close(qkv[:count], wanted, tolerance)


def _weight(kernels: TorchKernels, matrix: Tensor) -> Any:
    weight = kernels.new_linear(*matrix.shape, matrix.dtype)
    weight.load_rows(0, matrix)
    return weight


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert (found.float() - wanted.float()).abs().max() <= tolerance * max(1.0, float(wanted.float().abs().max()))


def _reference(form: DenseForm, attended: Tensor, residual: Tensor, qkv: Tensor, *weights: Any) -> None:
    """The kernels' own calls, in the order of DecoderModel."""
    kernels = TorchKernels()
    output, b1, post1, norm, gate_up, b2, down, b3, post2, next_norm, next_qkv, b4 = weights
    hidden = torch.empty_like(residual)
    gates = torch.empty(len(residual), len(gate_up), dtype=residual.dtype)
    kernels.linear(attended, _weight(kernels, output), hidden, b1)
    kernels.add_rms_norm(hidden, residual, norm, form.eps, hidden, post1)
    kernels.linear(hidden, _weight(kernels, gate_up), gates, b2)
    kernels.gated_activation(gates, gates[:, : form.intermediate_size], form.activation)
    kernels.linear(gates[:, : form.intermediate_size], _weight(kernels, down), hidden, b3)
    kernels.add_rms_norm(hidden, residual, next_norm, form.eps, hidden, post2)
    kernels.linear(hidden, _weight(kernels, next_qkv), qkv, b4)


class CachingPlatform(FakePlatform):
    """An accelerator whose allocator keeps what compiling took until it is told to release it."""

    def __init__(self) -> None:
        super().__init__(FakeDevice(total_bytes=2 << 30))

    def release_unused(self) -> int:
        released = self.device.ours.get("allocator cache", 0)
        self.take("allocator cache", -released)
        return released


def test_a_cold_cache_leaves_as_much_kv_as_a_warm_one(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model")
    tokens = []
    for temporaries_bytes in (0, 100 * MIB):
        platform = CachingPlatform()

        def backend(graph: Any, inputs: list[Any], platform: CachingPlatform = platform, taken: int = temporaries_bytes) -> Any:
            platform.take("allocator cache", taken)
            return graph

        worker = start(model, platform, StoredKernels(), backend, memory="max")
        assert worker.ready.warm.compiling.text == "on: backend"
        records = {record.name: record for record in worker.phase_records}
        assert records["warm"].peak_ours_bytes - records["warm"].before.reading.ours_bytes >= 6 * temporaries_bytes
        tokens.append(worker.ready.plan.kv_tokens)
        worker.close()
    assert tokens[0] == tokens[1]


def _failing(graph: Any, inputs: list[Any]) -> Any:
    raise RuntimeError("no code for this graph\nand a long story")


def _failing_late(graph: Any, inputs: list[Any]) -> Any:
    """Compiles the try alone."""
    if len(inputs) > 2:
        raise RuntimeError("no code for this graph")
    return graph


@pytest.mark.parametrize("backend", [_failing, _failing_late])
def test_where_compiling_fails_steps_run_call_by_call(backend: Any, model: Path, eager: list[list[int]]) -> None:
    kernels = StoredKernels()
    worker = start(model, StoringPlatform(kernels, False), kernels, backend, graph_mode="NONE")
    text = worker.ready.warm.compiling.text
    assert text.startswith("off: ") and "no code for this graph" in text and "\n" not in text
    assert run(worker) == eager
    worker.close()
    with pytest.raises(ConfigError, match="--strict refuses"):
        start(model, StoringPlatform(kernels, False), kernels, backend, strict="true")


def test_a_device_lost_while_compiling_stays_lost(model: Path) -> None:
    def losing(graph: Any, inputs: list[Any]) -> Any:
        if len(inputs) > 2:
            return _lose
        return graph

    kernels = StoredKernels()
    with pytest.raises(DeviceLost):
        start(model, StoringPlatform(kernels, False), kernels, losing)


def _lose(*args: Any) -> Any:
    raise DeviceLost("gone")


def test_reasons_are_one_line() -> None:
    assert compile_reason(RuntimeError("\n\n a b \n c")) == "RuntimeError: a b"
    assert compile_reason(RuntimeError("backend='x' raised:\nNoCompiler: none\n\nmore")) == "NoCompiler: none"
    assert len(compile_reason(RuntimeError("x" * 1000))) == 300


@pytest.mark.parametrize(
    ("environment", "said"),
    [({"TORCHDYNAMO_DISABLE": "1"}, "switched off by the environment"), ({"CXX": "/nonexistent/c++"}, "off: ")],
)
def test_without_a_compiler_a_start_says_so(environment: dict[str, str], said: str, tmp_path: Path) -> None:
    """A process whose compiler is missing or switched off; the inductor cache is a fresh one."""
    model = write_small_model(tmp_path / "model")
    code = (
        "from brim.config.resolve import resolve; from brim.runtime import build_engine_core\n"
        f"config = resolve({{'model': {str(model)!r}, 'max_model_len': 192, 'compile': 'true'}})\n"
        "core, info = build_engine_core(config, lambda progress: None)\n"
        "print(info['compile'], '|', info['kernels'])"
    )
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("off: ") and said in done.stdout and "plain weights" not in done.stdout


def test_on_a_host_the_kernels_keep_attention_and_sampling(tmp_path: Path) -> None:
    """Native kernels pack their weights; with --compile they work over plain ones, and tokens are those of the plain path."""
    model = write_small_model(tmp_path / "model")
    works = DenseCompiler().try_out(torch.device("cpu")) is None
    core, info = build_engine_core(
        resolve({**BASE, "model": str(model), "load_format": "auto", "compile": "true"}), lambda _: None
    )
    native = select_kernels("cpu").kernels.name
    assert info["compile"] == "on: inductor" if works else info["compile"].startswith("off: ")
    assert info["kernels"] == (f"{native}, plain weights" if works and native != "torch" else native)
    core.close()


def test_plain_weight_kernels_leave_the_rest_to_their_base() -> None:
    base = TorchKernels()
    kernels = PlainWeightKernels(base, torch.device("cpu"))
    assert kernels.plain_weights and not kernels.can_record and kernels.name == "torch, plain weights"
    assert kernels.linear_num_bytes(7, 5, torch.float32) == 140 and kernels.new_linear(7, 5, torch.float32).num_bytes == 140
    x, out = torch.randn(3, 8), torch.empty(3, 8)
    kernels.rms_norm(x, torch.ones(8), 1e-6, out)
    assert torch.allclose(out, torch.nn.functional.rms_norm(x, (8,), eps=1e-6), atol=1e-5)
