"""The phases of start-up as types: each function takes the last phase's object and yields the next one, complete.

    OpenedDevice -> LoadedModel -> ReservedWorker -> WarmWorker -> MeasuredWorker -> CapturedWorker
        -> CommittedWorker -> ReadyWorker

Owns what happens in each phase. How much fits is arithmetic of `memory`; what a step does is `runner`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brim.config.model_spec import ModelSpec
from brim.errors import MemoryBudgetError
from brim.kernels.base import Kernels
from brim.memory.arena.factory import new_arenas
from brim.memory.arena.view import group_views
from brim.memory.kv_layout import KVLayout
from brim.memory.ledger import LedgerLine
from brim.memory.workspace import WorkspacePlan, plan_workspace
from brim.models.base import Model
from brim.platforms.base import MemoryReading, Platform
from brim.units import format_bytes
from brim.worker.kv_cache import KVCache
from brim.worker.probes import small_step, worst_steps
from brim.worker.recorder import PhaseRecorder
from brim.worker.runner import ModelRunner
from brim.worker.sampler import Sampler
from brim.worker.step_inputs import StepInputs, StepLimits

MAX_PROOFS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StartSettings:
    """What start-up builds, decided before it begins. kv_blocks: blocks a group as planned; None: all that the cap leaves.

    min_blocks: the fewest blocks a group that still serve one full-length request. heap_bytes: set aside for requests.
    """

    spec: ModelSpec
    dtype: torch.dtype
    limits: StepLimits
    layout: KVLayout
    cap_bytes: int
    kv_blocks: tuple[int, ...] | None
    min_blocks: tuple[int, ...]
    heap_bytes: int
    record_programs: bool


@dataclass(frozen=True, slots=True)
class OpenedDevice:
    """A device that answered, its first reading, and the settings the plan found to fit."""

    platform: Platform
    kernels: Kernels
    settings: StartSettings
    recorder: PhaseRecorder
    baseline: MemoryReading


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """All weights in their final layout."""

    opened: OpenedDevice
    model: Model


@dataclass(frozen=True, slots=True)
class ReservedWorker:
    """Final addresses for the largest cache that could fit; the fewest blocks committed."""

    loaded: LoadedModel
    cache: KVCache


@dataclass(frozen=True, slots=True)
class WarmWorker:
    """Every buffer exists and every kernel ran once."""

    reserved: ReservedWorker
    runner: ModelRunner
    inputs: StepInputs
    sampler: Sampler
    workspace: Tensor
    workspace_plan: WorkspacePlan


@dataclass(frozen=True, slots=True)
class MeasuredWorker:
    """The worst steps ran; transient_bytes is what they took beyond what stayed."""

    warm: WarmWorker
    held_bytes: int
    transient_bytes: int


@dataclass(frozen=True, slots=True)
class CapturedWorker:
    """Recorded programs exist; graph_bytes is what the device lost to them."""

    measured: MeasuredWorker
    graph_bytes: int


@dataclass(frozen=True, slots=True)
class CommittedWorker:
    """KV blocks took what the cap left."""

    captured: CapturedWorker
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReadyWorker:
    """Proven: the worst steps ran over the committed cache within the cap. peak_bytes is the proof's high-water mark."""

    committed: CommittedWorker
    blocks: tuple[int, ...]
    held_bytes: int
    peak_bytes: int
    lines: tuple[LedgerLine, ...]


def load(opened: OpenedDevice, load_model: Callable[[PhaseRecorder], Model]) -> LoadedModel:
    """Stream the weights in; `load_model` knows the files."""
    with opened.recorder.phase("load", "reading weights"):
        model = load_model(opened.recorder)
        opened.platform.release_unused()
    return LoadedModel(opened, model)


def reserve(loaded: LoadedModel) -> ReservedWorker:
    """Reserve the addresses of the largest cache the cap could ever hold, commit the fewest blocks."""
    opened = loaded.opened
    settings = opened.settings
    with opened.recorder.phase("reserve", "reserving addresses for the KV cache"):
        if opened.platform.capabilities.reserve_commit:
            most = settings.kv_blocks or _blocks_for(settings, settings.cap_bytes)
            cache = _new_cache(opened, tuple(max(pair) for pair in zip(most, settings.min_blocks, strict=True)))
            cache.resize(settings.min_blocks)
        else:
            cache = _new_cache(opened, settings.min_blocks)
    return ReservedWorker(loaded, cache)


def warm(reserved: ReservedWorker) -> WarmWorker:
    """Allocate and touch every static buffer, then run one small step so that everything lazy has happened."""
    opened = reserved.loaded.opened
    settings, model = opened.settings, reserved.loaded.model
    with opened.recorder.phase("warm", "binding kernels and buffers"):
        inputs = StepInputs(settings.limits, settings.layout)
        sampler = Sampler(opened.kernels, model, settings.limits.max_num_seqs)
        plan = plan_workspace([shape.spec(settings.limits.max_num_tokens) for shape in model.buffer_shapes()])
        workspace = torch.zeros(plan.num_bytes, dtype=torch.uint8, device=opened.platform.torch_device())
        buffers = _buffer_views(model, settings.limits.max_num_tokens, plan, workspace)
        runner = ModelRunner(model, reserved.cache, inputs, sampler, buffers)
        blocks = reserved.cache.committed_blocks
        runner.probe(*small_step(settings.limits, settings.layout.block_size, blocks, settings.spec.vocab_size))
    return WarmWorker(reserved, runner, inputs, sampler, workspace, plan)


def measure(worker: WarmWorker) -> MeasuredWorker:
    """Really run the worst steps; what they took beyond what stays is charged as transient."""
    opened = worker.reserved.loaded.opened
    with opened.recorder.phase("measure", "running the worst steps"):
        _run_worst_steps(worker, opened)
        opened.platform.release_unused()
    record = opened.recorder.records[-1]
    return MeasuredWorker(worker, record.held_bytes, max(0, record.peak_bytes - record.held_bytes))


def capture(measured: MeasuredWorker) -> CapturedWorker:
    """Record decode programs over the final addresses, where the kernels can and the mode asks for it."""
    worker = measured.warm
    opened = worker.reserved.loaded.opened
    settings = opened.settings
    with opened.recorder.phase("capture", "recording decode programs"):
        if settings.record_programs:
            worker.runner.record_decode(opened.kernels, settings.limits.max_num_seqs)
    return CapturedWorker(measured, max(0, opened.recorder.records[-1].delta_bytes))


def commit(captured: CapturedWorker) -> CommittedWorker:
    """Give the KV cache exactly what the cap leaves (or what was planned, where that is less).

    Raises MemoryBudgetError where not even one full-length request is left room for.
    """
    measured = captured.measured
    worker = measured.warm
    opened, cache = worker.reserved.loaded.opened, worker.reserved.cache
    settings = opened.settings
    with opened.recorder.phase("commit", "committing KV blocks"):
        held = opened.platform.reading().ours_bytes - cache.committed_bytes
        room = settings.cap_bytes - held - max(measured.transient_bytes, settings.heap_bytes)
        rounding = len(settings.layout.groups) * opened.platform.capabilities.granularity_bytes
        blocks = _blocks_for(settings, max(0, room - rounding))
        if settings.kv_blocks is not None:
            blocks = tuple(min(pair) for pair in zip(blocks, settings.kv_blocks, strict=True))
        _require(blocks, settings, room)
        if opened.platform.capabilities.reserve_commit:
            blocks = cache.resize(blocks)
    return CommittedWorker(captured, blocks)


def prove(committed: CommittedWorker, ledger_lines: Callable[[CommittedWorker, int], Sequence[LedgerLine]]) -> ReadyWorker:
    """Run the worst steps over the committed cache; while the peak passes the cap, uncommit the difference and prove again."""
    worker = committed.captured.measured.warm
    opened, cache = worker.reserved.loaded.opened, worker.reserved.cache
    settings = opened.settings
    for _ in range(MAX_PROOFS):
        with opened.recorder.phase("prove", "proving the worst steps over the committed cache"):
            _run_worst_steps(worker, opened)
            opened.platform.release_unused()
        record = opened.recorder.records[-1]
        over = max(record.peak_bytes, record.held_bytes + settings.heap_bytes) - settings.cap_bytes
        if over <= 0:
            lines = tuple(ledger_lines(committed, record.held_bytes))
            return ReadyWorker(committed, cache.committed_blocks, record.held_bytes, record.peak_bytes, lines)
        blocks = _blocks_for(settings, cache.committed_bytes - over)
        _require(blocks, settings, cache.committed_bytes - over)
        cache.resize(blocks)
    raise MemoryBudgetError(
        f"The worst steps still pass the cap of {format_bytes(settings.cap_bytes)} after {MAX_PROOFS} proofs; raise --memory."
    )


def _run_worst_steps(worker: WarmWorker, opened: OpenedDevice) -> None:
    settings = opened.settings
    blocks = worker.reserved.cache.committed_blocks
    for name, arrays, rows in worst_steps(settings.limits, settings.layout.block_size, blocks, settings.spec.vocab_size):
        opened.recorder.progress(name, None)
        worker.runner.probe(arrays, rows)
    opened.platform.synchronize()


def _blocks_for(settings: StartSettings, num_bytes: int) -> tuple[int, ...]:
    limits = settings.limits
    return settings.layout.blocks_for_budget(num_bytes, limits.max_num_seqs, limits.max_num_tokens)


def _require(blocks: Sequence[int], settings: StartSettings, room_bytes: int) -> None:
    if all(have >= need for have, need in zip(blocks, settings.min_blocks, strict=True)):
        return
    need_bytes = settings.layout.bytes_for(settings.min_blocks)
    raise MemoryBudgetError(
        f"The KV cache of one request of {settings.limits.max_model_len} tokens takes {format_bytes(need_bytes)}, but the cap of "
        f"{format_bytes(settings.cap_bytes)} leaves {format_bytes(max(0, room_bytes))}; raise --memory or lower --max-model-len."
    )


def _new_cache(opened: OpenedDevice, blocks: Sequence[int]) -> KVCache:
    layout, dtype = opened.settings.layout, opened.settings.dtype
    arenas = new_arenas(opened.platform, layout, blocks)
    return KVCache(layout, arenas, lambda arena, of, group: group_views(arena, of, group, dtype))


def _buffer_views(model: Model, max_tokens: int, plan: WorkspacePlan, workspace: Tensor) -> dict[str, Tensor]:
    views = {}
    for shape in model.buffer_shapes():
        start = plan.offsets_bytes[shape.name]
        flat = workspace[start : start + max_tokens * shape.width * shape.dtype.itemsize]
        views[shape.name] = flat.view(shape.dtype).view(max_tokens, shape.width)
    return views
