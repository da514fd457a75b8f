"""The composition root: builds the engine from a configuration. The only place that knows all its parts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from brim.config.avoid import StartUses, apply_recorded, said_of_record
from brim.config.avoid_record import identity_of, read_record
from brim.config.model_source import ModelSource, open_model
from brim.config.resolve import known_fields, resolve
from brim.config.schema import BrimConfig
from brim.engine.block_manager import BlockManager
from brim.engine.core import EngineCore
from brim.engine.limits import EngineLimits
from brim.engine.messages import StartupProgress
from brim.engine.scheduler import Scheduler
from brim.engine.sequence_table import SequenceTable
from brim.engine.step import Executor
from brim.errors import ConfigError, DeviceError
from brim.kernels.base import Kernels
from brim.kernels.compiler import Backend
from brim.kernels.select import KernelSelection, select_kernels
from brim.kernels.triton.scratch import KernelLimits
from brim.layers.weights import matrix_num_bytes
from brim.memory.certificate import Certificate, certificates_folder, low_water_bytes
from brim.platforms.base import Platform
from brim.platforms.detect import detect, registered
from brim.platforms.profile import calibrated_folder
from brim.platforms.scenario import read_scenario
from brim.worker.device_worker import DeviceWorker
from brim.worker.plan_calibration import FIRST_START, later_starts, measured_start, profile_from, start_json, start_of_json
from brim.worker.plan_device import plan_device
from brim.worker.plan_preview import PlannedModel, open_planned, plan_model, plan_together
from brim.worker.scripted_run import run_scenario
from brim.worker.scripted_verdict import verdict_json
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
    config, identity = _without_what_died(config, platform)
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


def play_scenario(path: Path) -> dict[str, Any]:
    """What Brim does on the scripted device of a file, and what it should have done (docs/scenarios.md). Raises ConfigError."""
    scenario = read_scenario(path)
    return verdict_json(scenario, run_scenario(scenario, core_over))


def plan_starts(configs: Sequence[BrimConfig], devices: Sequence[str], parts: EngineParts | None = None) -> dict[str, Any]:
    """What starts of these models would come to on each of these devices (docs/planning.md); several models share a device.

    Raises ModelError, ConfigError, DeviceError, and MemoryBudgetError where several models do not fit together."""
    parts, started = parts or EngineParts(), time.perf_counter()
    known = [plan_device(name, parts.detect, set(registered()) - {"auto"}) for name in devices]
    plans = []
    with ExitStack() as stack:
        opened = [stack.enter_context(closing(open_planned(config))) for config in configs]
        for device in known:
            models = opened
            if device.live is not None:
                models = [_as_it_starts(one, config, device.live) for one, config in zip(opened, configs, strict=True)]
            plans += [plan_model(models[0], device)] if len(models) == 1 else plan_together(models, device)
    return {"plans": plans, "seconds": round(time.perf_counter() - started, 3)}


def measure_start(settings: dict[str, Any]) -> dict[str, Any]:
    """Start once and say what that took, for `calibrate`. Raises BrimError."""
    core, _ = build_engine_core(resolve(settings), lambda progress: None)
    worker = core.executor
    assert isinstance(worker, DeviceWorker), "build_engine_core starts one"
    try:
        return start_json(measured_start(worker))
    finally:
        worker.close()


def calibrate(path: Path | None, device: str, on_progress: Callable[[StartupProgress], None]) -> dict[str, Any]:
    """Measure this machine's profile by starting small models, each in a process of its own, and write it to path, or where plans
    find it. Raises DeviceError where no start came to be, ConfigError where the file cannot be written."""
    starts, failures = [], []
    todo = [FIRST_START]
    with tempfile.TemporaryDirectory() as folder:
        while todo:
            start = todo.pop(0)
            text = f"{start.num_layers} layers, at most {start.max_num_seqs} sequences, graphs {start.graph_mode}"
            on_progress(StartupProgress("calibrate", text))
            config_path = Path(folder) / "config.json"
            config_path.write_text(json.dumps(start.model), encoding="utf-8")
            task = json.dumps({"model": str(config_path), "device": device, **start.settings})
            command = [sys.executable, "-m", "brim.calibration_main"]
            done = subprocess.run(command, input=task, capture_output=True, text=True, check=False)
            if done.returncode:
                failures.append(f"{text}: {(done.stderr.strip().splitlines() or ['it died'])[-1]}")
            else:
                starts.append(start_of_json(json.loads(done.stdout.splitlines()[-1])))
                todo = todo if start is not FIRST_START else list(later_starts(starts[0]))
    if not starts:
        raise DeviceError(f"No start came to be, so nothing was measured. {failures[0]}")
    profile = profile_from(starts, time.strftime("%Y-%m-%d"))
    path = path or calibrated_folder() / f"{profile.name}.toml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(profile.to_toml(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The profile cannot be written to {path}: {error.strerror}.") from error
    figures = {name: asdict(figure) for name, figure in profile.figures.items()}
    return {"profile": profile.name, "file": str(path), "figures": figures, "starts": len(starts), "failures": failures}


def _as_it_starts(planned: PlannedModel, config: BrimConfig, platform: Platform) -> PlannedModel:
    """Without what died in a start of this configuration; its shapes are read as for any plan."""
    return replace(planned, config=replace(_without_what_died(config, platform)[0], model=planned.config.model))


def _without_what_died(config: BrimConfig, platform: Platform) -> tuple[BrimConfig, dict[str, str]]:
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
