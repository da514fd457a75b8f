"""Every graph mode on a device whose graphs are stored kernel calls: the same tokens as call by call, whatever the padding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from tests.small_models import write_small_model

from brim.config.model_source import open_model
from brim.config.resolve import resolve
from brim.config.schema import DeviceConfig, GraphMode
from brim.engine.block_manager import BlockManager
from brim.engine.core import EngineCore
from brim.engine.limits import EngineLimits
from brim.engine.messages import AddRequest
from brim.engine.sampling_params import SamplingParams
from brim.engine.scheduler import Scheduler
from brim.engine.sequence_table import SequenceTable
from brim.errors import ConfigError
from brim.kernels.torch_ref import TorchKernels
from brim.memory.step_memory import StepLimits
from brim.platforms.fake import FakeDevice, FakePlatform
from brim.worker.device_worker import DeviceWorker
from brim.worker.graph_choice import choose_graph_mode
from brim.worker.startup import start_worker
from brim.worker.step_sizes import exact_sizes, rounded_sizes

MODES = get_args(GraphMode)
LENGTH, SEQS, TOKENS = 192, 12, 96


class StoredKernels(TorchKernels):
    """The reference kernels, whose calls can be stored by `StoringPlatform.capture`."""

    can_capture = True
    storing: list[Any] | None = None
    num_calls = 0


def _stored(name: str) -> Any:
    plain = getattr(TorchKernels, name)

    def call(self: StoredKernels, *args: Any, **kwargs: Any) -> None:
        self.num_calls += 1
        if self.storing is not None:
            self.storing.append((plain, args, kwargs))
        else:
            plain(self, *args, **kwargs)

    return call


for _name in ("linear", "embed", "rms_norm", "add_rms_norm", "gated_activation", "gather_rows", "rope_and_cache", "attention",
              "sample", "resolve_ids", "remember_ids", "begin_decodes", "end_decodes"):  # fmt: skip
    setattr(StoredKernels, _name, _stored(_name))


class StoredGraph:
    """Stored calls."""

    def __init__(self, kernels: StoredKernels) -> None:
        self._kernels = kernels
        self.calls: list[Any] = []

    def replay(self) -> None:
        """Make them, with the very tensors of the capture."""
        for plain, args, kwargs in self.calls:
            plain(self._kernels, *args, **kwargs)


class StoringPlatform(FakePlatform):
    """A scripted accelerator with graphs."""

    def __init__(self, kernels: StoredKernels, async_tokens: bool, mapped_host: bool = False) -> None:
        super().__init__(FakeDevice(total_bytes=2 << 30))
        self.capabilities = replace(self.capabilities, graphs=True, graph_modes=MODES, async_tokens=async_tokens)
        self.capabilities = replace(self.capabilities, mapped_host=mapped_host)
        self._kernels = kernels

    @contextmanager
    def capture(self) -> Iterator[StoredGraph]:
        """Store the calls made inside."""
        assert self._kernels.storing is None, "captures do not nest"
        graph = StoredGraph(self._kernels)
        self._kernels.storing = graph.calls
        try:
            yield graph
        finally:
            self._kernels.storing = None


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / request.param
    if request.param == "llama":
        return write_small_model(folder)
    folder.mkdir()
    config = {
        "model_type": "gemma3_text", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 7,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 32,
        "max_position_embeddings": 512, "query_pre_attn_scalar": 16, "eos_token_id": 1, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def start(
    model: Path, async_tokens: bool = False, mapped_host: bool = False, **settings: Any
) -> tuple[DeviceWorker, StoredKernels]:
    kernels = StoredKernels()
    flags = {"model": str(model), "load_format": "dummy", "dtype": "float32", "max_model_len": LENGTH, "max_num_seqs": SEQS}
    config = resolve({**flags, "max_num_batched_tokens": TOKENS, "memory": "1200MiB", **settings})
    platform = StoringPlatform(kernels, async_tokens, mapped_host)
    if config.device.arena == "static":
        platform.restrict(reserve_commit=False, arena_backend="static")
    worker = start_worker(config, platform, lambda _: kernels, open_model(config.model), lambda p: None)
    return worker, kernels


def run(worker: DeviceWorker) -> list[list[int]]:
    """Nine requests of many lengths, greedy and sampled, some special, arriving in two waves."""
    layout = worker.ready.plan.split.layout
    table = SequenceTable(SEQS, LENGTH, layout)
    depth = worker.ready.warm.reserved.loaded.opened.settings.pipeline_depth
    limits = EngineLimits(max_num_seqs=SEQS, max_num_batched_tokens=TOKENS, max_model_len=LENGTH, pipeline_depth=depth)
    core = EngineCore(Scheduler(limits, BlockManager(layout, worker.committed_blocks, table), table), worker, vocab_size=300)
    rng = np.random.default_rng(7)
    lengths = (3, 150, 17, 90, 1, 33, 64, 5, 40)
    params = [
        SamplingParams(temperature=0, max_tokens=15, ignore_eos=True),
        SamplingParams(temperature=0.9, seed=4, max_tokens=11, ignore_eos=True),
        SamplingParams(temperature=0.7, seed=9, max_tokens=9, ignore_eos=True, logprobs=2, frequency_penalty=0.5),
    ]
    found: dict[str, list[int]] = {}
    for i, length in enumerate(lengths):
        core.add(AddRequest(str(i), rng.integers(2, 290, length).tolist(), params[0 if i % 3 else i % 2 + 1], 0.0))
        found[str(i)] = []
        if i == 4:
            for _ in range(6):
                take(core, found)
    while core.has_work:
        take(core, found)
    return list(found.values())


def take(core: EngineCore, found: dict[str, list[int]]) -> None:
    for output in core.step():
        assert output.error is None
        found[output.request_id] += output.new_token_ids


@pytest.fixture(scope="module")
def eager(model: Path) -> list[list[int]]:
    worker, _ = start(model, enforce_eager=True)
    assert worker.num_programs == 0
    tokens = run(worker)
    worker.close()
    return tokens


@pytest.mark.parametrize(
    ("arena", "async_tokens", "mapped_host"),
    [("auto", False, False), ("auto", True, False), ("static", True, False), ("auto", True, True)],
)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_tokens_of_eager_steps(
    mode: GraphMode, arena: str, async_tokens: bool, mapped_host: bool, model: Path, eager: list[list[int]]
) -> None:
    """Also where two steps are in flight and the second one reads ids that the host does not know yet, and where captured steps
    read the host's memory and write to it."""
    worker, kernels = start(model, async_tokens, mapped_host, graph_mode=mode, arena=arena)
    assert worker.ready.warm.reserved.loaded.opened.settings.pipeline_depth == 1 + async_tokens
    assert (worker.num_programs > 0) == (mode != "NONE")
    before = kernels.num_calls
    assert run(worker) == eager
    if mode == "FULL":  # all that is not replayed: sampling of steps that are no plain decode
        assert kernels.num_calls - before < 300
    worker.close()


def test_the_last_layer_has_rows_of_sizes_that_ran_in_warm(
    model: Path, eager: list[list[int]], steps: list[tuple[int, int]]
) -> None:
    """Where products are loaded for each number of rows."""
    worker, _ = start(model, enforce_eager=True)
    steps.clear()
    assert run(worker) == eager
    sizes = set(worker.ready.warm.reserved.loaded.opened.settings.sizes.tokens.values)
    assert {wanted for _, wanted in steps} <= sizes
    assert any(1 < wanted < count for count, wanted in steps)
    worker.close()


def test_padding_reaches_every_size(model: Path) -> None:
    """Decode batches of 1 to 12 sequences are served by captured steps of 1, 2, 4, 8 and 12."""
    worker, _ = start(model, graph_mode="FULL_DECODE_ONLY")
    assert worker.num_programs == 5
    worker.close()


def test_rounded_sizes_hold_every_step() -> None:
    for seqs, tokens in ((1, 16), (3, 100), (256, 8192), (300, 4096), (1000, 1000)):
        for rows in (1, seqs // 2 + 1, seqs):
            sizes = rounded_sizes(StepLimits(seqs, tokens, 4096), rows)
            assert all(count <= sizes.tokens.up(count) <= tokens for count in range(1, tokens + 1))
            assert all(count <= sizes.rows.up(count) <= rows for count in range(1, rows + 1))
            assert max(sizes.decode) <= min(seqs, rows) and all(size <= tokens for size in sizes.mixed)
    llama = rounded_sizes(StepLimits(256, 8192, 8192), 256)
    assert llama.decode[:5] == (1, 2, 4, 8, 16) and llama.decode[-1] == 256 and len(llama.decode) == 35
    assert llama.tokens.up(8000) == 8000 and llama.tokens.up(513) == 576 and llama.tokens.up(65) == 72
    assert exact_sizes(StepLimits(100, 256, 512), 100).decode == tuple(range(1, 65))


@pytest.mark.parametrize(
    ("asked", "available", "expected"),
    [
        (None, MODES, "FULL"),
        (None, ("NONE", "PIECEWISE"), "PIECEWISE"),
        (None, ("NONE",), "NONE"),
        ("FULL", MODES, "FULL"),
        ("FULL", ("NONE", "FULL_DECODE_ONLY"), "FULL_DECODE_ONLY"),
        ("FULL_AND_PIECEWISE", ("NONE", "PIECEWISE"), "PIECEWISE"),
        ("PIECEWISE", ("NONE", "FULL_DECODE_ONLY"), "NONE"),
        ("NONE", MODES, "NONE"),
    ],
)
def test_the_mode_follows_what_works(asked: GraphMode | None, available: tuple[GraphMode, ...], expected: GraphMode) -> None:
    choice = choose_graph_mode(DeviceConfig(graph_mode=asked), available, "the reason.")
    assert choice.mode == expected
    assert asked in (None, expected) or "the reason." in choice.reason


def test_strict_refuses_a_mode_that_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"the reason\."):
        choose_graph_mode(DeviceConfig(graph_mode="FULL", strict=True), ("NONE",), "the reason.")
    assert choose_graph_mode(DeviceConfig(strict=True), ("NONE",), "the reason.").mode == "NONE"


def test_eager_wins_and_contradictions_are_refused() -> None:
    assert choose_graph_mode(DeviceConfig(enforce_eager=True), MODES, "").mode == "NONE"
    with pytest.raises(ConfigError, match="contradict"):
        choose_graph_mode(DeviceConfig(enforce_eager=True, graph_mode="FULL"), MODES, "")


def test_graphs_are_replayed_not_run(model: Path) -> None:
    """A plain decode step of a captured size calls no kernel but through its graph."""
    worker, kernels = start(model, graph_mode="FULL_AND_PIECEWISE")
    layout = worker.ready.plan.split.layout
    table = SequenceTable(SEQS, LENGTH, layout)
    limits = EngineLimits(max_num_seqs=SEQS, max_num_batched_tokens=TOKENS, max_model_len=LENGTH)
    core = EngineCore(Scheduler(limits, BlockManager(layout, worker.committed_blocks, table), table), worker, vocab_size=300)
    core.add(AddRequest("r", [5, 6, 7], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True), 0.0))
    core.step()
    before = kernels.num_calls
    while core.has_work:
        core.step()
    assert kernels.num_calls == before
    worker.close()
