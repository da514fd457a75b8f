"""A scenario's start on a scripted device: the real pipeline, and the supervisor's second try without what killed the first. Owns
the lives of one start; what is served and judged afterwards is `scripted_run`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Thread
from typing import Any

from brim.config.avoid import apply_avoided, merge
from brim.config.model_source import ModelSource
from brim.config.model_spec import spec_from_hf_config
from brim.config.resolve import resolve
from brim.config.schema import Avoided, BrimConfig
from brim.engine.start_watch import StartWatch
from brim.errors import BrimError, DeviceError, EngineError, RankFailed
from brim.formats.model_files import ModelFiles
from brim.kernels.base import Kernels
from brim.kernels.scripted import ScriptedKernels
from brim.models.base import Model
from brim.models.scripted import ScriptedModel
from brim.parallel.ranks import OneRank, Ranks
from brim.parallel.thread_ranks import ThreadMeeting
from brim.platforms.scenario import Scenario
from brim.platforms.scripted_device import ScriptedDevice
from brim.platforms.scripted_platform import ScriptedPlatform, scripted_platform
from brim.worker.device_worker import DeviceWorker
from brim.worker.phases import StartSettings
from brim.worker.startup import start_worker

_NAME = "scripted"


@dataclass(slots=True)
class ScriptedStart:
    """How a start ended: a worker, or the error that a user would see. avoided: what it does without; num_deaths: on the way;
    peers: the other ranks' starts."""

    config: BrimConfig
    source: ModelSource
    device: ScriptedDevice
    platform: ScriptedPlatform | None = None
    worker: DeviceWorker | None = None
    error: BrimError | None = None
    avoided: tuple[Avoided, ...] = ()
    num_deaths: int = 0
    peers: tuple[ScriptedStart, ...] = ()

    @property
    def all_ranks(self) -> tuple[ScriptedStart, ...]:
        """This one first."""
        return (self, *self.peers)


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


def start_scripted(scenario: Scenario, *, is_first: bool = True, avoided: tuple[Avoided, ...] = ()) -> ScriptedStart:
    """Start, and after a death start again without the feature under suspicion, as the supervisor does.

    is_first: no earlier start left caches behind. avoided: what an earlier start on this machine recorded."""
    asked, source = config_of(scenario), source_of(scenario)
    num_deaths = 0
    while True:
        config = apply_avoided(asked, avoided)
        lives = [_Life(scenario, rank, config, source, is_first=is_first) for rank in range(scenario.ranks)]
        _live(lives)
        found = lives[0].start
        found.avoided, found.num_deaths, found.peers = avoided, num_deaths, tuple(life.start for life in lives[1:])
        blamed = next((blamed for life in lives if (blamed := life.blamed) is not None), None)
        if blamed is None or asked.device.strict:
            return found
        avoided = merge(avoided, (blamed,))
        num_deaths += 1


class _Life:
    """One try of one rank."""

    def __init__(self, scenario: Scenario, rank: int, config: BrimConfig, source: ModelSource, *, is_first: bool) -> None:
        self._scenario = with_changes(scenario, rank)
        self._watch = StartWatch()
        self.start = ScriptedStart(config, source, device_of(self._scenario, is_first=is_first))

    @property
    def blamed(self) -> Avoided | None:
        """What to do without after this death; None where it lives, gave an answer, or only followed another rank."""
        error = self.start.error
        died = isinstance(error, (DeviceError, EngineError)) and not isinstance(error, RankFailed)
        return self._watch.blame(type(error).__name__) if died else None

    def live(self, ranks: Ranks) -> None:
        """To a worker or an error."""
        found = self.start
        try:
            found.platform = scripted_platform(found.device)
            found.worker = _one_life(self._scenario, found, self._watch, ranks)
        except BrimError as error:
            found.error = error
        except Exception as error:  # as the engine process reports what nobody knows
            found.error = EngineError(f"{type(error).__name__}: {error}")
            found.error.__cause__ = error
        if found.error is not None:
            ranks.close()


def _live(lives: Sequence[_Life]) -> None:
    """All ranks at once, a thread each."""
    if len(lives) == 1:
        lives[0].live(OneRank())
        return
    meeting = ThreadMeeting(len(lives))
    threads = [
        Thread(target=life.live, args=(ranks,), name=f"rank {ranks.index}")
        for life, ranks in zip(lives, meeting.ranks, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _one_life(scenario: Scenario, found: ScriptedStart, watch: StartWatch, ranks: Ranks) -> DeviceWorker:
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

    return start_worker(
        found.config, platform, make_kernels, found.source, watch.noting(on_progress), make_model=make_model, ranks=ranks
    )


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
