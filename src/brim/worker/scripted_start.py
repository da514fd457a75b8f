"""A scenario's start on a scripted device: the real pipeline, and the supervisor's second try without what killed the first. Owns
the lives of one start; what is served and judged afterwards is `scripted_run`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from brim.config.avoid import apply_avoided, merge
from brim.config.model_source import ModelSource
from brim.config.model_spec import spec_from_hf_config
from brim.config.resolve import resolve
from brim.config.schema import Avoided, BrimConfig
from brim.engine.start_watch import StartWatch
from brim.errors import BrimError, DeviceError, EngineError
from brim.formats.model_files import ModelFiles
from brim.kernels.base import Kernels
from brim.kernels.scripted import ScriptedKernels
from brim.models.base import Model
from brim.models.scripted import ScriptedModel
from brim.platforms.scenario import Scenario
from brim.platforms.scripted_device import ScriptedDevice
from brim.platforms.scripted_platform import ScriptedPlatform, scripted_platform
from brim.worker.device_worker import DeviceWorker
from brim.worker.phases import StartSettings
from brim.worker.startup import start_worker

_NAME = "scripted"


@dataclass(slots=True)
class ScriptedStart:
    """How a start ended: a worker, or the error that a user would see. avoided: what it does without; num_deaths: on the way."""

    config: BrimConfig
    source: ModelSource
    device: ScriptedDevice
    platform: ScriptedPlatform | None = None
    worker: DeviceWorker | None = None
    error: BrimError | None = None
    avoided: tuple[Avoided, ...] = ()
    num_deaths: int = 0


MakeDevice = Callable[[], ScriptedDevice]


def config_of(scenario: Scenario) -> BrimConfig:
    """The settings of a scenario. Raises ConfigError."""
    return resolve({"model": _NAME, "load_format": "dummy", **scenario.settings})


def source_of(scenario: Scenario) -> ModelSource:
    """Its model: a shape, no files. Raises UnsupportedModel, BrokenModel."""
    return ModelSource(ModelFiles(name=_NAME, kind="config_only", weight_paths=()), spec_from_hf_config(scenario.model), None, ())


def device_of(scenario: Scenario, *, is_first: bool = True) -> ScriptedDevice:
    """Its device before anything happened. is_first: no earlier start left caches behind."""
    consumers = tuple(c for c in scenario.consumers if is_first or c.name not in scenario.first_start_only)
    return ScriptedDevice(
        script=scenario.device, neighbour_events=scenario.neighbours, consumers=consumers, faults=scenario.faults
    )


def start_scripted(scenario: Scenario, make_device: MakeDevice, avoided: tuple[Avoided, ...] = ()) -> ScriptedStart:
    """Start, and after a death start again without the feature under suspicion, as the supervisor does.

    avoided: what an earlier start on this machine recorded."""
    asked, source = config_of(scenario), source_of(scenario)
    num_deaths = 0
    while True:
        device, watch = make_device(), StartWatch()
        found = ScriptedStart(apply_avoided(asked, avoided), source, device, avoided=avoided, num_deaths=num_deaths)
        try:
            found.platform = scripted_platform(device)
            found.worker = _one_life(scenario, found, watch)
            return found
        except BrimError as error:
            found.error = error
        except Exception as error:  # as the engine process reports what nobody knows
            found.error = EngineError(f"{type(error).__name__}: {error}")
            found.error.__cause__ = error
        died = isinstance(found.error, (DeviceError, EngineError))
        blamed = watch.blame(type(found.error).__name__) if died else None
        if blamed is None or asked.device.strict:
            return found
        avoided = merge(avoided, (blamed,))
        num_deaths += 1


def _one_life(scenario: Scenario, found: ScriptedStart, watch: StartWatch) -> DeviceWorker:
    platform, device = found.platform, found.device
    assert platform is not None, "it was opened"
    if found.config.device.arena == "static":
        platform.restrict(reserve_commit=False, arena_backend="static")

    def make_kernels(max_num_seqs: int) -> Kernels:
        kernels = ScriptedKernels(platform)
        kernels.can_capture = not platform.capabilities.host_memory
        return kernels

    def make_model(kernels: Kernels, settings: StartSettings) -> Model:
        platform.work("load")
        return ScriptedModel(
            settings.spec,
            kernels,
            settings.dtype,
            settings.limits.max_model_len,
            platform.torch_device(),
            platform,
            platform.runtime.allocator.allocate,
            scenario.ranks,
        )

    def on_progress(progress: Any) -> None:
        device.enter(progress.phase)

    return start_worker(found.config, platform, make_kernels, found.source, watch.noting(on_progress), make_model=make_model)


def with_changes(scenario: Scenario, rank: int) -> Scenario:
    """The scenario as one rank sees it."""
    for change in scenario.rank_changes:
        if change.rank == rank:
            script = scenario.device
            script = replace(
                script,
                total_bytes=change.total_bytes or script.total_bytes,
                context_bytes=change.context_bytes or script.context_bytes,
                outside_bytes=script.outside_bytes + change.neighbour_bytes,
            )
            faults = (*scenario.faults, change.fault) if change.fault else scenario.faults
            return replace(scenario, device=script, faults=faults)
    return scenario
