"""From settings to a proven worker: the plan first, then the phases in order. Owns how defaults are filled and what the
footprint before KV is made of; the arithmetic is `memory`'s and each phase is `phases`'."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Literal

import torch

from brim.config.avoid import StartUses
from brim.config.model_source import ModelSource
from brim.config.model_spec import ModelSpec
from brim.config.schema import BrimConfig, GraphMode, MemoryRequest
from brim.engine.messages import StartupProgress
from brim.errors import ConfigError
from brim.kernels.base import Kernels
from brim.kernels.compiler import Backend
from brim.kernels.planned import KernelFacts
from brim.kernels.torch_ref import TorchKernels
from brim.layers.weights import weights_num_bytes
from brim.memory.footprint import Footprint, fixed_lines
from brim.memory.kv_layout import KVLayout
from brim.memory.ledger import Ledger, LedgerLine
from brim.memory.planner import PlanRequest, make_plan
from brim.memory.profiling import Profiler
from brim.memory.step_memory import StepLimits, logit_rows, rotary_table_bytes, step_buffers
from brim.memory.workspace import plan_workspace
from brim.models.base import Model
from brim.models.loader import CHUNK_BYTES, fill_dummy, load_weights
from brim.parallel.ranks import OneRank, Ranks
from brim.platforms.base import Platform, PlatformDefaults
from brim.platforms.profile import StartCosts
from brim.units import MIB, ceil_div
from brim.worker.compile_choice import choose_compile
from brim.worker.device_worker import DeviceWorker, foreign_errors
from brim.worker.graph_choice import choose_graph_mode
from brim.worker.phases import (
    OpenedDevice,
    ReadyWorker,
    StartSettings,
    capture,
    commit,
    load,
    measure,
    prove,
    reserve,
    warm,
)
from brim.worker.precompile import compile_ahead
from brim.worker.rank_agreement import agree_on_arena, agree_on_settings, agree_on_step_sizes
from brim.worker.sampler import Sampler
from brim.worker.step_inputs import StepInputs
from brim.worker.step_sizes import exact_sizes, predicted_graph_bytes, rounded_sizes
from brim.worker.weight_choice import choose_weights

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_HEAP_BYTES = 16 * MIB
_HEAP_BYTES_PER_TOKEN = 48  # a prompt as a list of ints, its int64 buffer, its hashes
_HEAP_TOKENS = 1 << 18
_NOISE_BYTES = 2 * MIB  # readings of the same start differ by up to 0.6 MiB
MakeModel = Callable[[Kernels, StartSettings], Model]


def start_worker(
    config: BrimConfig,
    platform: Platform,
    make_kernels: Callable[[int], Kernels],
    source: ModelSource,
    on_progress: Callable[[StartupProgress], None],
    compile_backend: Backend = "inductor",
    make_model: MakeModel | None = None,
    ranks: Ranks | None = None,
) -> DeviceWorker:
    """Plan, then open -> load -> reserve -> warm -> measure -> capture -> commit -> prove.

    make_kernels takes the most sequences of a step. compile_backend: what torch.compile is to use where --compile is given.
    make_model: gives the loaded model instead of reading `source` (scripted devices). ranks: the peers that start beside it.
    Raises MemoryBudgetError with ledger and nearest settings before anything large is read, where the plan does not fit;
    RankFailed where a peer fails, and peers learn what is raised here.
    """
    ranks, phase = ranks or OneRank(), ["open"]

    def noted(progress: StartupProgress) -> None:
        phase[0] = progress.phase
        on_progress(progress)
        ranks.heed()

    try:
        return _start(config, platform, make_kernels, source, noted, compile_backend, make_model, ranks)
    except BaseException as error:
        ranks.fail(f"the phase {phase[0]}", error)
        raise


def _start(
    config: BrimConfig,
    platform: Platform,
    make_kernels: Callable[[int], Kernels],
    source: ModelSource,
    on_progress: Callable[[StartupProgress], None],
    compile_backend: Backend,
    make_model: MakeModel | None,
    ranks: Ranks,
) -> DeviceWorker:
    profiler = Profiler(platform)
    before_bytes, model_device = platform.reading().ours_bytes, platform.torch_device()
    on_progress(StartupProgress("open", "reading the device"))
    with platform.stream(), profiler.phase("open", "context", "kernels and their scratch"):
        compiling = choose_compile(config.device, model_device, compile_backend)
        agree_on_arena(platform, ranks)
        num_seqs, num_tokens = agree_on_step_sizes(*_step_sizes(config, platform.default_limits()), ranks)
        sized = replace(config.scheduler, max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens)
        config = replace(config, scheduler=sized)
        kernels = compiling.kernels(make_kernels(num_seqs), model_device)
        kernels.start_libraries()
        settings = agree_on_settings(config, lambda one: plan_start(one, platform, kernels, source), ranks)
        settings = replace(settings, compiling=compiling)
        platform.set_cap(settings.plan.ceiling_bytes)
    on_progress(StartupProgress("open", "the plan is made", uses=_uses(platform, kernels, settings)))
    ahead = compile_ahead(kernels, source.spec, settings.limits, settings.layout, settings.dtype)
    opened = OpenedDevice(platform, kernels, settings, profiler, on_progress, ahead, ranks)

    def load_model() -> Model:
        if make_model is not None:
            return make_model(kernels, settings)

        def progress(text: str, fraction: float | None) -> None:
            on_progress(StartupProgress("load", text, fraction))

        model = compiling.model_class(
            source.spec, kernels, settings.dtype, settings.limits.max_model_len, model_device, settings.weights.kept
        )
        if source.weights is None:
            fill_dummy(model, progress, config.model.seed)
        else:
            load_weights(model, source.weights, kernels, progress)
        source.close()
        return model

    with foreign_errors(platform), closing(ahead):
        ready = prove(commit(capture(measure(warm(reserve(load(opened, load_model)))))))
    return DeviceWorker(ready, _final_ledger(ready, before_bytes))


def plan_start(config: BrimConfig, platform: Platform, kernels: KernelFacts, source: ModelSource) -> StartSettings:
    """Defaults filled in, the plan made. Raises MemoryBudgetError, ConfigError."""
    spec, defaults = source.spec, platform.default_limits()
    dtype = resolve_dtype(config, platform, spec.stored_dtype)
    num_seqs, num_tokens = _step_sizes(config, defaults)
    weights = choose_weights(config.model, kernels, source)
    layout = KVLayout.of(spec, config.memory.block_size, dtype.itemsize)
    given_reserve = config.memory.reserve_bytes
    graphs = choose_graph_mode(config.device, *_available_modes(platform, kernels, spec))
    sizes_for = exact_sizes if kernels.can_record or not kernels.can_capture else rounded_sizes

    costs = platform.start_costs()

    def graph_bytes(limits: StepLimits, rows: int) -> int:
        return predicted_graph_bytes(graphs, sizes_for(limits, rows), spec.num_layers, costs)

    weight_bytes = weights_num_bytes(spec, kernels, dtype, weights.kept)
    footprint = _footprint(spec, platform, weight_bytes, dtype, layout, graph_bytes, costs)
    plan = make_plan(
        PlanRequest(
            memory=config.memory.memory or MemoryRequest(defaults.memory),
            reading=platform.reading(),
            reserve_bytes=defaults.reserve_bytes if given_reserve is None else given_reserve,
            reserve_given=given_reserve is not None,
            layout=layout,
            footprint=footprint,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=num_tokens,
            max_model_len=_model_len(config, defaults, spec.max_position),
            model_max_len=spec.max_position,
            granularity_bytes=platform.capabilities.granularity_bytes,
            reach_whole=platform.capabilities.reserve_commit and not platform.capabilities.host_memory,
            noise_bytes=_NOISE_BYTES if platform.capabilities.host_memory else 0,
        )
    )
    if not config.scheduler.enable_chunked_prefill and plan.limits.max_model_len > num_tokens:
        raise ConfigError(
            f"Without chunked prefill --max-num-batched-tokens {num_tokens} must hold a whole prompt; "
            f"raise it to {plan.limits.max_model_len} or lower --max-model-len."
        )
    rows = logit_rows(spec, plan.limits, dtype.itemsize)
    return StartSettings(
        spec=spec,
        dtype=dtype,
        plan=plan,
        heap_bytes=_heap_bytes(plan.limits, layout) if platform.capabilities.host_memory else 0,
        graphs=graphs,
        pipeline_depth=2 if platform.capabilities.async_tokens and kernels.can_capture else 1,
        sizes=sizes_for(plan.limits, rows),
        weights=weights,
    )


def _uses(platform: Platform, kernels: Kernels, settings: StartSettings) -> StartUses:
    """What may have to be done without, should this start die."""
    return StartUses(
        graph_mode=settings.graphs.mode,
        graph_modes=_available_modes(platform, kernels, settings.spec)[0],
        compile=settings.compiling.compiler is not None,
        virtual_memory=platform.capabilities.reserve_commit,
        vendor_kernels=kernels.name != TorchKernels.name,
    )


def _available_modes(platform: Platform, kernels: KernelFacts, spec: ModelSpec) -> tuple[tuple[GraphMode, ...], str]:
    """The graph modes that work with these kernels, and what to say where one is missing."""
    if kernels.can_record:
        if spec.logit_softcap:
            return ("NONE",), f"{kernels.name} kernels cannot record the soft-capping of logits."
        return ("NONE", "FULL_DECODE_ONLY"), f"{kernels.name} kernels record decode steps only."
    if not kernels.can_capture:
        return ("NONE",), f"{kernels.name} kernels cannot be captured."
    if not platform.capabilities.graphs:
        return ("NONE",), platform.reasons.get("graphs") or f"platform '{platform.name}' captures no graphs."
    return platform.capabilities.graph_modes, ""


def resolve_dtype(config: BrimConfig, platform: Platform, stored: str) -> torch.dtype:
    """The dtype asked for; "auto": the one stored, where the platform computes it, else the platform's best."""
    native = platform.capabilities.dtypes
    name = config.model.dtype
    if name == "auto":
        name = stored if stored in native else native[0]  # type: ignore[assignment]
    return _DTYPES[name]


def _step_sizes(config: BrimConfig, defaults: PlatformDefaults) -> tuple[int, int]:
    num_seqs = config.scheduler.max_num_seqs or defaults.max_num_seqs
    num_tokens = config.scheduler.max_num_batched_tokens or max(num_seqs, defaults.max_num_batched_tokens)
    if num_tokens < num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {num_tokens} is less than --max-num-seqs {num_seqs}: a step holds one token of every "
            "running sequence. Raise the first or lower the second."
        )
    return num_seqs, num_tokens


def _model_len(config: BrimConfig, defaults: PlatformDefaults, max_position: int) -> int | Literal["auto"]:
    asked = config.model.max_model_len
    if asked is None:
        return min(max_position, defaults.max_model_len_cap or max_position)
    if asked != "auto" and asked > max_position:
        raise ConfigError(f"--max-model-len {asked} is more than the model's own limit of {max_position}; lower it.")
    return asked


def _heap_bytes(limits: StepLimits, layout: KVLayout) -> int:
    """Set aside for what requests take in the interpreter's heap: token lists and buffers, block tables, messages."""
    tokens = min(limits.max_num_seqs * limits.max_model_len, _HEAP_TOKENS)
    tables = len(layout.groups) * limits.max_num_seqs * ceil_div(limits.max_model_len, layout.block_size) * 4
    return _HEAP_BYTES + tables + tokens * _HEAP_BYTES_PER_TOKEN


def _footprint(
    spec: ModelSpec,
    platform: Platform,
    weight_bytes: int,
    dtype: torch.dtype,
    layout: KVLayout,
    graph_bytes: Callable[[StepLimits, int], int],
    costs: StartCosts,
) -> Footprint:
    """Everything but KV, from the arithmetic of the very objects that will be built."""
    reading = platform.reading()
    fixed = fixed_lines(context_bytes=reading.ours_bytes, weight_bytes=weight_bytes, context_known_by=reading.known_by)

    def lines_for(limits: StepLimits) -> list[LedgerLine]:
        workspace = plan_workspace(step_buffers(spec, limits, dtype.itemsize))
        inputs = StepInputs.bytes_for(limits, len(layout.groups), layout.block_size)
        rows = logit_rows(spec, limits, dtype.itemsize)
        sampler = Sampler.bytes_for(spec.vocab_size, spec.hidden_size, limits, dtype.itemsize, rows)
        lines = [
            LedgerLine("buffers", "rotary tables", rotary_table_bytes(spec, limits.max_model_len), "computed"),
            LedgerLine("buffers", "step inputs", inputs, "computed"),
            LedgerLine("buffers", "sampler", sampler, "computed"),
            LedgerLine("workspace", "step workspace", workspace.num_bytes, "computed"),
        ]
        if platform.capabilities.host_memory:
            lines.append(LedgerLine("activations", "what starting leaves", costs.of("starting_bytes"), "predicted"))
            lines.append(LedgerLine("buffers", "set aside for requests", _heap_bytes(limits, layout), "predicted"))
        else:
            lines.append(LedgerLine("activations", "kernel images, allocator rounding", costs.of("rounding_bytes"), "predicted"))
        lines.append(LedgerLine("graphs", "captured steps", graph_bytes(limits, rows), "predicted"))
        return [line for line in lines if line.num_bytes]

    return Footprint(fixed=fixed, lines_for=lines_for, load_transient_bytes=3 * CHUNK_BYTES)


def _final_ledger(ready: ReadyWorker, context_bytes: int) -> Ledger:
    """The account after prove: one line an owner, what the phases measured and computed, and what is not ours."""
    opened = ready.warm.reserved.loaded.opened
    owner = "interpreter and libraries" if opened.platform.capabilities.host_memory else "device context"
    lines = [LedgerLine("context", owner, context_bytes, "measured"), *opened.profiler.lines]
    if opened.settings.heap_bytes:
        lines.append(LedgerLine("buffers", "set aside for requests", opened.settings.heap_bytes, "predicted"))
    reading = opened.platform.reading()
    reserve_bytes = min(ready.plan.budget.reserve_bytes, reading.free_bytes)
    lines.append(LedgerLine("other_processes", "other processes", reading.others_bytes, "measured"))
    lines.append(LedgerLine("reserve", "reserve", reserve_bytes, "computed"))
    lines.append(LedgerLine("free", "free", reading.free_bytes - reserve_bytes, "measured"))
    merged: dict[tuple[str, str], LedgerLine] = {}
    for line in lines:
        key = (line.category, line.owner)
        known = merged.get(key)
        num_bytes = line.num_bytes + (known.num_bytes if known else 0)
        merged[key] = LedgerLine(line.category, line.owner, num_bytes, line.known_by)
    kept = tuple(line for line in merged.values() if line.num_bytes)
    return Ledger(ready.plan.cap_bytes, reading.total_bytes, kept)
