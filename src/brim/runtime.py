"""The composition root: builds the engine from a configuration. The only place that knows all its parts.

What is made of the same parts and serves nobody is `planning`'s: a start need not import it.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from brim.config.avoid import StartUses, apply_recorded, said_of_record
from brim.config.avoid_record import identity_of, read_record
from brim.config.model_source import ModelSource, open_model
from brim.config.resolve import known_fields
from brim.config.schema import BrimConfig
from brim.engine.block_manager import BlockManager
from brim.engine.core import EngineCore
from brim.engine.limits import EngineLimits
from brim.engine.messages import StartupProgress
from brim.engine.scheduler import Scheduler
from brim.engine.sequence_table import SequenceTable
from brim.engine.step import Executor
from brim.kernels.base import Kernels
from brim.kernels.compiler import Backend
from brim.kernels.select import KernelSelection, select_kernels
from brim.kernels.triton.scratch import KernelLimits
from brim.layers.weights import matrix_num_bytes
from brim.memory.certificate import Certificate, certificates_folder, low_water_bytes
from brim.platforms.base import Platform
from brim.platforms.detect import detect
from brim.worker.device_worker import DeviceWorker
from brim.worker.startup import start_worker


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made with: scripted parts in tests, these everywhere else."""

    detect: Callable[[str], Platform] = detect
    select_kernels: Callable[..., KernelSelection] = select_kernels
    compile_backend: Backend = "inductor"


def build_engine_core(
    config: BrimConfig,
    on_progress: Callable[[StartupProgress], None],
    meanwhile: Callable[[], object] | None = None,
    parts: EngineParts | None = None,
) -> tuple[EngineCore, dict[str, Any]]:
    """An engine that is ready to serve, and what to say of it (plain JSON values).

    `meanwhile` waits for what else this process opens at the same time; it is called before the plan reads the device, so that
    what that took is measured and the plan is the same every time.

    Raises BrimError: the model cannot be used, it does not fit, or the device fails.
    """
    started = time.perf_counter()
    parts = parts or EngineParts()
    platform = parts.detect(config.device.device)
    config, identity = without_what_died(config, platform)
    if config.device.arena == "static":
        platform.restrict(reserve_commit=False, arena_backend="static")
    source = open_model(config.model)
    selections: list[KernelSelection] = []

    def make_kernels(max_num_seqs: int) -> Kernels:
        spec, native = source.spec, config.device.kernels != "torch"
        limits = KernelLimits.of(spec, max_num_seqs)
        selection = parts.select_kernels(platform.torch_device(), config.device.num_threads, spec.head_dim, native, limits)
        selections.append(selection)
        if meanwhile is not None:
            meanwhile()
        return selection.kernels

    asked = StartUses(compile=config.device.compile, vendor_kernels=config.device.kernels != "torch")
    on_progress(StartupProgress("open", "reading the device", identity=identity, uses=asked))
    worker = start_worker(config, platform, make_kernels, source, on_progress, parts.compile_backend)
    core = core_over(config, platform, worker, source)
    info = _describe(config, platform, worker, selections[-1], time.perf_counter() - started)
    info["certificate"] = _certify(config, platform, worker)
    return core, info


def without_what_died(config: BrimConfig, platform: Platform) -> tuple[BrimConfig, dict[str, str]]:
    """The configuration without what ended an earlier engine of this kind (said in one line), and which kind it is."""
    versions = {name: version(name) for name in ("brim", "torch")}
    identity = identity_of(platform.name, platform.describe(), versions, config.model)
    changed = apply_recorded(config, read_record(identity))
    if changed is not config:
        new = [one for one in changed.avoided if one not in config.avoided]
        print(f"brim: {said_of_record(new)}", file=sys.stderr, flush=True)
    return changed, identity


def core_over(
    config: BrimConfig, platform: Platform, worker: DeviceWorker, source: ModelSource, executor: Executor | None = None
) -> EngineCore:
    """Scheduler, blocks and loop over a proven worker. executor: runs the steps where that is more than the worker alone."""
    plan = worker.ready.plan
    limits = EngineLimits(
        max_num_seqs=plan.limits.max_num_seqs,
        max_num_batched_tokens=plan.limits.max_num_tokens,
        max_model_len=plan.limits.max_model_len,
        enable_chunked_prefill=config.scheduler.enable_chunked_prefill,
        pipeline_depth=worker.ready.warm.reserved.loaded.opened.settings.pipeline_depth,
    )
    layout = plan.split.layout
    table = SequenceTable(limits.max_num_seqs, limits.max_model_len, layout)
    caching = config.memory.enable_prefix_caching
    capacity = worker.ready.capacity_blocks if platform.capabilities.reserve_commit else None
    blocks = BlockManager(layout, worker.committed_blocks, table, enable_prefix_caching=caching, capacity=capacity)
    return EngineCore(
        Scheduler(limits, blocks, table),
        executor or worker,
        vocab_size=source.spec.vocab_size,
        eos_token_ids=source.eos_token_ids,
        seed=config.model.seed,
    )


def _certify(config: BrimConfig, platform: Platform, worker: DeviceWorker) -> str | None:
    """Write the certificate of this start to the cache folder; its path, None where the folder cannot be written."""
    records = tuple(worker.phase_records)
    values = {
        name: str(getattr(getattr(config, section), name)) for name, (section, _) in known_fields().items() if section != "server"
    }
    certificate = Certificate(
        plan=worker.ready.warm.reserved.loaded.opened.settings.plan,
        outcome=worker.ready.plan,
        ledger=worker.ledger,
        phases=records,
        peak_ours_bytes=worker.ready.peak_bytes,
        low_water_bytes=low_water_bytes(records),
        settings=values,
        sources=config.sources,
        device=platform.describe(),
        versions={name: version(name) for name in ("brim", "torch", "numpy")},
        avoided=config.avoided,
    )
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", config.model.model).strip("-.")[-80:] or "model"
    try:
        return str(certificate.write(certificates_folder(), f"{platform.name}-{name}"))
    except OSError:
        return None


def _describe(
    config: BrimConfig, platform: Platform, worker: DeviceWorker, selection: KernelSelection, ready_s: float
) -> dict[str, Any]:
    opened = worker.ready.warm.reserved.loaded.opened
    settings, kernels = opened.settings, opened.kernels
    plan, spec, graphs = worker.ready.plan, settings.spec, worker.ready.committed.captured.graphs
    avoided = {one.feature: f"avoided: {one.reason}" for one in config.avoided}
    return {
        "model": config.model.model,
        "family": spec.family,
        "num_parameters": spec.num_parameters,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "weights": settings.weights.text,
        "device": platform.describe(),
        "kernels": kernels.name,
        "kernels_reason": avoided.get("vendor_kernels", selection.fallback_reason),
        "num_threads": getattr(kernels, "num_threads", None),
        "compile": f"off: {avoided['compile']}" if "compile" in avoided else worker.ready.warm.compiling.text,
        "graph_mode": graphs.mode,
        "graph_mode_reason": avoided.get("graphs", graphs.reason),
        "avoided": [asdict(one) for one in config.avoided],
        "decode_programs": worker.num_programs,
        "vocab_size": spec.vocab_size,
        "eos_token_ids": list(spec.eos_token_ids),
        "max_model_len": plan.limits.max_model_len,
        "max_num_seqs": plan.limits.max_num_seqs,
        "max_num_batched_tokens": plan.limits.max_num_tokens,
        "kv_tokens": plan.kv_tokens,
        "full_length_requests": plan.full_length_requests,
        "cap_bytes": plan.cap_bytes,
        "torch_device": str(platform.torch_device()),
        "embedding_only_bytes": 0
        if spec.tie_word_embeddings
        else matrix_num_bytes("embedding", spec, kernels, settings.dtype, settings.weights.kept),
        "weight_bytes": worker.ready.warm.reserved.loaded.model.weight_bytes,
        "kv_bytes_per_token": plan.split.layout.token_bytes,
        "ready_s": round(ready_s, 3),
        "startup_report": worker.startup_report(),
    }
