"""The phases of start-up as types: each function takes the last phase's object and yields the next one, complete.

    OpenedDevice -> LoadedModel -> ReservedWorker -> WarmWorker -> MeasuredWorker -> CapturedWorker
        -> CommittedWorker -> ReadyWorker

Owns what happens in each phase. How much fits is arithmetic of `memory`; what a step does is `runner`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from brim.config.model_spec import ModelSpec
from brim.engine.messages import StartupProgress
from brim.errors import MemoryBudgetError, OutOfDeviceMemory
from brim.kernels.base import Kernels
from brim.memory.arena.factory import new_arenas
from brim.memory.kv_layout import KVLayout
from brim.memory.ledger import Category
from brim.memory.plan import MemoryPlan
from brim.memory.profiling import PhaseRecord, PhaseScope, Profiler
from brim.memory.step_memory import StepLimits, logit_rows, step_buffers
from brim.memory.workspace import WorkspacePlan, plan_workspace
from brim.models.base import Model
from brim.parallel.ranks import OneRank, Ranks
from brim.platforms.base import Platform
from brim.units import MIB, format_bytes
from brim.worker.compile_choice import CompileChoice, compile_model
from brim.worker.decode_feed import DecodeFeed
from brim.worker.graph_capture import capture_what_fits, record
from brim.worker.graph_choice import GraphChoice
from brim.worker.kv_cache import KVCache
from brim.worker.precompile import CompileAhead
from brim.worker.probes import warm_steps, worst_steps
from brim.worker.rank_agreement import agree_on_blocks, agree_on_graphs
from brim.worker.runner import ModelRunner
from brim.worker.sampler import Sampler
from brim.worker.step_inputs import StepInputs
from brim.worker.step_sizes import StepSizes
from brim.worker.weight_choice import WeightChoice
from brim.worker.workspace_views import buffer_views, logits_view

MAX_PROOFS = 4
_WORTH_MEASURING_BYTES = 16 * MIB  # given back after the worst steps; less is not worth running them again
MAX_COMMITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class StartSettings:
    """What start-up builds, decided before it begins. heap_bytes: set aside for what requests take in this process's heap.

    pipeline_depth: steps that may be in flight: 2 where the next step's ids can be read on the device.
    """

    spec: ModelSpec
    dtype: torch.dtype
    plan: MemoryPlan
    heap_bytes: int
    graphs: GraphChoice
    sizes: StepSizes
    pipeline_depth: int = 1
    compiling: CompileChoice = field(default_factory=CompileChoice)
    weights: WeightChoice = field(default_factory=WeightChoice)

    @property
    def limits(self) -> StepLimits:
        """The largest step."""
        return self.plan.limits

    @property
    def layout(self) -> KVLayout:
        """How KV blocks are laid out."""
        return self.plan.split.layout


@dataclass(frozen=True, slots=True)
class OpenedDevice:
    """A device that answered, what it read before and after our context existed, and settings that were found to fit."""

    platform: Platform
    kernels: Kernels
    settings: StartSettings
    profiler: Profiler
    on_progress: Callable[[StartupProgress], None]
    ahead: CompileAhead = field(default_factory=CompileAhead)
    ranks: Ranks = field(default_factory=OneRank)

    @contextmanager
    def phase(self, name: str, text: str, rest: Category, owner: str) -> Iterator[PhaseScope]:
        """Measure one phase and tell the user; measured bytes beyond the computed ones go to `rest`."""
        self.tell(name, text)
        with self.platform.stream(), self.profiler.phase(name, rest, owner) as scope:
            yield scope

    def tell(self, phase: str, text: str, fraction: float | None = None) -> None:
        """The phase under way has come this far."""
        self.on_progress(StartupProgress(phase, text, fraction))

    def give_back_unused(self) -> None:
        """Where device memory is the host's. Elsewhere what the allocator holds stays: the next step would take it again."""
        if self.platform.capabilities.host_memory:
            self.platform.release_unused()


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
    compiling: CompileChoice


@dataclass(frozen=True, slots=True)
class MeasuredWorker:
    """The worst steps ran; transient_bytes is what they took beyond what stayed."""

    warm: WarmWorker
    transient_bytes: int


@dataclass(frozen=True, slots=True)
class CapturedWorker:
    """Recorded programs exist; graph_bytes is what the device lost to them. graphs: the mode that was really captured."""

    measured: MeasuredWorker
    graph_bytes: int
    graphs: GraphChoice


@dataclass(frozen=True, slots=True)
class CommittedWorker:
    """KV blocks took what the cap left. plan: the plan settled by what was measured."""

    captured: CapturedWorker
    plan: MemoryPlan


@dataclass(frozen=True, slots=True)
class ReadyWorker:
    """Proven: the worst steps ran over the committed cache within the cap. peak_bytes is the proof's high-water mark.

    capacity_blocks: how far each group may grow while serving: to the cap, where neighbours left less than that at the start.
    """

    committed: CommittedWorker
    plan: MemoryPlan
    held_bytes: int
    peak_bytes: int
    capacity_blocks: tuple[int, ...]

    @property
    def warm(self) -> WarmWorker:
        """The runner and its buffers."""
        return self.committed.captured.measured.warm


def load(opened: OpenedDevice, load_model: Callable[[], Model]) -> LoadedModel:
    """Stream the weights in; `load_model` knows the files."""
    with opened.phase("load", "reading weights", "context", "runtime, grown while loading") as scope:
        model = load_model()
        scope.add("weights", "model", model.weight_bytes)
        scope.add("buffers", "rotary tables", model.table_bytes)
        opened.platform.release_unused()
    return LoadedModel(opened, model)


def reserve(loaded: LoadedModel) -> ReservedWorker:
    """Reserve the addresses of the largest cache the cap could ever hold, commit the fewest blocks."""
    opened = loaded.opened
    settings = opened.settings
    with opened.phase("reserve", "reserving addresses for the KV cache", "context", "page tables and views") as scope:
        fewest = settings.plan.min_blocks
        cache = _new_cache(opened, settings.plan.max_blocks if opened.platform.capabilities.reserve_commit else fewest, fewest)
        scope.add("kv_cache", "KV cache", cache.committed_bytes)
    return ReservedWorker(loaded, cache)


def warm(reserved: ReservedWorker) -> WarmWorker:
    """Allocate and touch every static buffer, then run one small step so that everything lazy has happened."""
    opened = reserved.loaded.opened
    settings, model = opened.settings, reserved.loaded.model
    with opened.phase("warm", "binding kernels and buffers", "activations", "kernels and libraries") as scope:
        device, limits = opened.platform.torch_device(), settings.limits
        plan = plan_workspace(step_buffers(settings.spec, limits, settings.dtype.itemsize))
        workspace = torch.zeros(plan.num_bytes, dtype=torch.uint8, device=device)
        buffers = buffer_views(model, limits.max_num_tokens, plan, workspace)
        num_rows = logit_rows(settings.spec, limits, settings.dtype.itemsize)
        logits = logits_view(settings.spec.vocab_size, num_rows, plan, workspace)
        in_flight, kernels = settings.pipeline_depth, opened.kernels
        inputs = StepInputs(limits, settings.layout, device, in_flight)
        sampler = Sampler(kernels, model, limits, logits, settings.sizes.rows, opened.platform.mark, in_flight)
        mark, fed = opened.platform.mark, in_flight > 1 and opened.platform.capabilities.mapped_host
        feed = DecodeFeed(kernels, settings.layout, inputs, sampler, mark, in_flight) if fed else None
        runner = ModelRunner(model, reserved.cache, inputs, sampler, buffers, settings.sizes, kernels, in_flight > 1, feed)
        scope.add("buffers", "step inputs", inputs.num_bytes)
        scope.add("buffers", "sampler", sampler.num_bytes)
        scope.add("workspace", "step workspace", plan.num_bytes)
        compiling = compile_model(settings.compiling, opened.platform, model, runner, limits.max_num_tokens)
        blocks = reserved.cache.committed_blocks
        report = opened.ahead.wait(
            lambda done, all_: opened.tell("warm", f"compiling kernels, {done} of {all_}", done / (all_ or 1))
        )
        if report.num_variants or report.failures:
            opened.tell("warm", report.text)
        runner.warm_sizes()  # first: libraries keep what they take now, and what only passes through must not lie around it
        for arrays, rows, shape in warm_steps(limits, settings.layout.block_size, blocks, settings.spec, opened.ahead.steps):
            runner.probe(arrays, rows, shape)
        if settings.compiling.compiler is not None:  # what compiling took goes; what steps take, the worst ones take again
            opened.platform.release_unused()
    return WarmWorker(reserved, runner, inputs, sampler, workspace, plan, compiling)


def measure(worker: WarmWorker) -> MeasuredWorker:
    """Really run the worst steps; what they took beyond what stays is charged as transient."""
    opened = worker.reserved.loaded.opened
    with opened.phase("measure", "running the worst steps", "activations", "what the worst steps left"):
        _run_worst_steps(worker, opened, "measure")
        if opened.platform.release_unused() >= _WORTH_MEASURING_BYTES and not opened.platform.capabilities.host_memory:
            # a tuner's or a compiler's temporaries: what the steps themselves need, they take again
            opened.platform.reset_peak()
            _run_worst_steps(worker, opened, "measure")
    return MeasuredWorker(worker, opened.profiler.records[-1].transient_bytes)


def capture(measured: MeasuredWorker) -> CapturedWorker:
    """Capture graphs (a native backend's recorded programs) over the final addresses, as the mode asks."""
    worker = measured.warm
    opened = worker.reserved.loaded.opened

    def progress(done: str) -> None:
        opened.tell("capture", done)

    def captured(choice: GraphChoice) -> GraphChoice:
        worker.runner.forget_programs()
        return capture_what_fits(worker.runner, opened.kernels, opened.platform, choice, opened.settings.plan, progress)

    with opened.phase("capture", "capturing graphs", "graphs", "captured steps"):
        graphs = agree_on_graphs(captured(opened.settings.graphs), captured, opened.ranks)
    return CapturedWorker(measured, opened.profiler.records[-1].change.ours_bytes, graphs)


def commit(captured: CapturedWorker) -> CommittedWorker:
    """Give the KV cache exactly what the cap leaves (or what was planned, where that is less).

    Raises MemoryBudgetError where not even one full-length request is left room for.
    """
    measured = captured.measured
    opened, cache = measured.warm.reserved.loaded.opened, measured.warm.reserved.cache
    with opened.phase("commit", "committing KV blocks", "context", "page tables and views") as scope:
        before_bytes = cache.committed_bytes
        settled = _commit_what_is_there(measured, cache, captured.graphs)
        plan = agree_on_blocks(settled, opened.ranks)
        if plan is not settled:
            _hold(measured.warm, plan.kv_blocks, captured.graphs)
        scope.add("kv_cache", "KV cache", cache.committed_bytes - before_bytes)
    return CommittedWorker(captured, plan)


def _commit_what_is_there(measured: MeasuredWorker, cache: KVCache, graphs: GraphChoice) -> MemoryPlan:
    """The plan settled by what is held and free now. A neighbour may take memory between reading and commit: read again.

    Where the reading stays as it was, it is wrong: each attempt then asks for less, by a 128th of the cache, a 64th, and so on.
    """
    opened = measured.warm.reserved.loaded.opened
    settings = opened.settings
    reading, wrong_by_bytes = opened.platform.reading(), 0
    for attempt in range(MAX_COMMITS):
        held_bytes = reading.ours_bytes - cache.committed_bytes + max(measured.transient_bytes, settings.heap_bytes)
        if opened.platform.capabilities.host_memory:  # what is available there moves with every file that is read
            plan = settings.plan.settle(held_bytes)
        else:
            plan = settings.plan.raised(reading)
            plan = plan.settle(held_bytes, reading.reachable_bytes - plan.budget.reserve_bytes - wrong_by_bytes)
        opened.platform.set_cap(plan.cap_bytes)
        try:
            _hold(measured.warm, plan.kv_blocks, graphs)
        except OutOfDeviceMemory:
            if attempt + 1 == MAX_COMMITS:
                raise
            before, reading = reading, opened.platform.reading()
            if reading.reachable_bytes >= before.reachable_bytes:
                wrong_by_bytes += plan.kv_bytes >> (7 - attempt)
            continue
        return plan
    raise AssertionError("the last attempt returns or raises")


def prove(committed: CommittedWorker) -> ReadyWorker:
    """Run the worst steps over the committed cache; while the peak passes the cap, uncommit the difference and prove again.

    Raises MemoryBudgetError where no cache that serves one request keeps the cap.
    """
    worker, plan = committed.captured.measured.warm, committed.plan
    opened, cache = worker.reserved.loaded.opened, worker.reserved.cache
    heap_bytes = opened.settings.heap_bytes
    for _ in range(MAX_PROOFS):
        with opened.phase(
            "prove", "proving the worst steps over the committed cache", "unattributed", "grown while proving"
        ) as scope:
            before_bytes = cache.committed_bytes
            if before_bytes != plan.kv_bytes:
                _hold(worker, plan.kv_blocks, committed.captured.graphs)
                scope.add("kv_cache", "KV cache", cache.committed_bytes - before_bytes)
            _run_worst_steps(worker, opened, "prove")
            opened.give_back_unused()
        record = opened.profiler.records[-1]
        held_bytes = record.after.reading.ours_bytes
        needed_bytes = max(record.peak_ours_bytes, held_bytes + heap_bytes)
        over = needed_bytes - plan.ceiling_bytes
        if over <= 0:
            kept = replace(plan, cap_bytes=max(plan.cap_bytes, needed_bytes))  # only "enough" may move its cap
            opened.platform.set_cap(kept.cap_bytes)
            return _agreed(committed, kept, needed_bytes - cache.committed_bytes, record)
        plan = plan.settle(plan.ceiling_bytes - cache.committed_bytes + over)
    raise MemoryBudgetError(
        f"The worst steps still pass the cap of {format_bytes(plan.ceiling_bytes)} after {MAX_PROOFS} proofs; raise --memory."
    )


def _agreed(committed: CommittedWorker, proven: MemoryPlan, beside_bytes: int, record: PhaseRecord) -> ReadyWorker:
    """What was proven here and on every other rank. beside_bytes: the most that is needed beside the KV cache."""
    worker = committed.captured.measured.warm
    opened, cache, held_bytes = worker.reserved.loaded.opened, worker.reserved.cache, record.after.reading.ours_bytes
    plan = agree_on_blocks(proven, opened.ranks)
    if plan is not proven:
        with opened.phase("prove", "giving back what other ranks do not have", "unattributed", "grown while proving") as scope:
            before_bytes = cache.committed_bytes
            _hold(worker, plan.kv_blocks, committed.captured.graphs)
            scope.add("kv_cache", "KV cache", cache.committed_bytes - before_bytes)
            held_bytes += cache.committed_bytes - before_bytes
    reachable = plan.split.within(plan.cap_bytes - beside_bytes) or plan.kv_blocks
    most = (min(count, limit) for count, limit in zip(reachable, plan.max_blocks, strict=True))
    capacity = tuple(max(count, now) for count, now in zip(most, plan.kv_blocks, strict=True))
    capacity = opened.ranks.minimum("how far the KV cache may grow", capacity)
    return ReadyWorker(committed, plan, held_bytes, record.peak_ours_bytes, capacity)


def _hold(worker: WarmWorker, blocks: Sequence[int], graphs: GraphChoice) -> None:
    """Make the cache exactly this large; without reserve/commit that means built anew, and programs recorded again."""
    if worker.reserved.loaded.opened.platform.capabilities.reserve_commit:
        worker.reserved.cache.resize(blocks, keep_content=False)
    elif tuple(blocks) != worker.reserved.cache.committed_blocks:
        opened = worker.reserved.loaded.opened
        platform = opened.platform
        worker.runner.forget_programs()
        worker.reserved.cache.close()
        platform.synchronize()
        platform.release_unused()
        worker.reserved.cache.rebuild(blocks, blocks)
        for done in record(worker.runner, opened.kernels, platform, graphs):
            opened.tell("capture", done)


def _run_worst_steps(worker: WarmWorker, opened: OpenedDevice, phase: str) -> None:
    settings = opened.settings
    blocks = worker.reserved.cache.committed_blocks
    for name, arrays, rows in worst_steps(settings.limits, settings.layout.block_size, blocks, settings.spec.vocab_size):
        opened.tell(phase, name)
        worker.runner.probe(arrays, rows)
    opened.platform.synchronize()


def _new_cache(opened: OpenedDevice, reach: Sequence[int], committed: Sequence[int]) -> KVCache:
    layout, dtype = opened.settings.layout, opened.settings.dtype
    return KVCache(
        layout,
        reach,
        committed,
        dtype,
        lambda counts: new_arenas(opened.platform, layout, counts),
        opened.platform.memory_view,
    )
