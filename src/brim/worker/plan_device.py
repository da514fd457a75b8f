"""A device that plans are made for: one of a profile, or the one that is here. Owns which platform and kernels a plan sees.

The arithmetic is `startup.plan_start`'s, the very code that a start runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from brim.config.model_source import ModelSource
from brim.config.schema import BrimConfig
from brim.kernels.planned import KernelFacts, planned_kernels
from brim.kernels.triton.scratch import KernelLimits
from brim.platforms.base import Platform
from brim.platforms.profile import DeviceProfile, find_profile
from brim.platforms.profile_platform import PlannedPlatform, live_platform, profile_platform
from brim.worker.phases import StartSettings
from brim.worker.start_preview import kernel_limits, open_kernels
from brim.worker.startup import plan_start

THIS = "this"
Open = Callable[[BrimConfig, ModelSource], tuple[PlannedPlatform, KernelFacts]]


@dataclass(frozen=True, slots=True)
class PlanDevice:
    """known: "measured", "predicted", or "here" for the device that is there, which is `live`. opened: platform and kernels for a
    model."""

    name: str
    description: str
    known: str
    opened: Open
    live: Platform | None = None

    def plan(self, config: BrimConfig, source: ModelSource, neighbour_bytes: int = 0) -> StartSettings:
        """What a start would decide, beside neighbours that hold so much. Raises MemoryBudgetError, ConfigError."""
        platform, kernels = self.opened(config, source)
        if neighbour_bytes:
            platform = platform.beside(neighbour_bytes)
        if config.device.arena == "static":
            platform.restrict(reserve_commit=False, arena_backend="static")
        return plan_start(config, platform, kernels, source)


def plan_device(name: str, detect: Callable[[str], Platform], platforms: set[str]) -> PlanDevice:
    """By name: `this` or a platform that is here, else a profile. Raises ConfigError for a name nobody knows, DeviceError."""
    if name == THIS or name in platforms:
        return _here(detect("auto" if name == THIS else name))
    return _of_profile(find_profile(name))


def _of_profile(profile: DeviceProfile) -> PlanDevice:
    def opened(config: BrimConfig, source: ModelSource) -> tuple[PlannedPlatform, KernelFacts]:
        backend = "torch" if config.device.kernels == "torch" else profile.kernels
        limits = kernel_limits(config, profile_platform(profile), source.spec)
        kernels = planned_kernels(backend, limits, profile.costs.of("num_cores"))
        return profile_platform(profile, kernels.buffers), kernels

    return PlanDevice(profile.name, profile.description, "measured" if profile.is_measured else "predicted", opened)


def _here(platform: Platform) -> PlanDevice:
    """Kernels and libraries take their memory, then plans are made from that reading; once for each size of their buffers."""
    opened: dict[tuple[str, KernelLimits], tuple[PlannedPlatform, KernelFacts]] = {}

    def open_once(config: BrimConfig, source: ModelSource) -> tuple[PlannedPlatform, KernelFacts]:
        key = (config.device.kernels, kernel_limits(config, platform, source.spec))
        if key not in opened:
            with platform.stream():
                kernels = open_kernels(config, platform, source.spec).kernels
                kernels.start_libraries()
                opened[key] = (live_platform(platform), kernels)
                kernels.close()
        planned, kernel_facts = opened[key]
        return planned.beside(0), kernel_facts

    return PlanDevice(platform.name, str(platform.describe().get("device", platform.name)), "here", open_once, platform)
