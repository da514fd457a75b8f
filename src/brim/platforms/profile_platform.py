"""A device that is not there, or is not to be touched again: the platform contract over one reading. Owns what the first reading
on a device of a profile would be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from brim.errors import ConfigError
from brim.platforms.base import Capabilities, MemoryReading, Platform, PlatformDefaults
from brim.platforms.cpu import host_defaults
from brim.platforms.profile import DeviceProfile, StartCosts
from brim.platforms.scenario import DeviceScript
from brim.platforms.scripted_allocator import ScriptedAllocator
from brim.platforms.scripted_device import ScriptedDevice
from brim.platforms.torch_platform import ALL_MODES, NO_MODES, device_defaults
from brim.units import format_bytes

_ENDLESS_BYTES = 1 << 50


class PlannedPlatform(Platform):
    """reading: what a start would read when it plans. defaults: from the free bytes to the values for settings left open.

    reasons: why capabilities are missing."""

    def __init__(
        self,
        name: str,
        reading: MemoryReading,
        capabilities: Capabilities,
        defaults: Callable[[int], PlatformDefaults],
        costs: StartCosts,
        reasons: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.capabilities = capabilities
        self.reasons = dict(reasons or {})
        self._reading, self._defaults, self._costs = reading, defaults, costs

    def beside(self, neighbour_bytes: int) -> PlannedPlatform:
        """The same device with one more neighbour. Raises ConfigError where there is no room for it."""
        now = self._reading
        if neighbour_bytes > now.free_bytes:
            raise ConfigError(
                f"{self.name} has {format_bytes(now.free_bytes)} free, not {format_bytes(neighbour_bytes)} for the others."
            )
        reading = replace(now, free_bytes=now.free_bytes - neighbour_bytes, others_bytes=now.others_bytes + neighbour_bytes)
        return PlannedPlatform(self.name, reading, self.capabilities, self._defaults, self._costs, self.reasons)

    def reading(self) -> MemoryReading:
        """The device just opened, with libraries and the kernels' own memory."""
        return self._reading

    def start_costs(self) -> StartCosts:
        """As given."""
        return self._costs

    def reset_peak(self) -> None:
        """Nothing is held for a while here."""

    def peak_ours_bytes(self) -> int:
        """What is held."""
        return self._reading.ours_bytes

    def synchronize(self) -> None:
        """Nothing is queued."""

    def default_limits(self) -> PlatformDefaults:
        """Those of the platform that the device has or would have."""
        return self._defaults(self._reading.free_bytes)

    def describe(self) -> dict[str, object]:
        """Its name and size."""
        return {"platform": self.name, "device": self.name, "total_bytes": self._reading.total_bytes}


def profile_platform(profile: DeviceProfile, kernel_buffers: Sequence[int] = ()) -> PlannedPlatform:
    """The device of a profile as a start would find it. kernel_buffers: bytes of each buffer that its kernels allocate.

    Raises ConfigError where not even runtime and libraries fit."""
    costs = profile.costs
    ours_bytes = costs.of("context_bytes") + allocator_bytes(kernel_buffers)
    ours_bytes += 0 if profile.host_memory else costs.of("library_bytes")
    others_bytes, total_bytes = costs.of("outside_bytes"), costs.of("total_bytes")
    free_bytes = total_bytes - ours_bytes - others_bytes
    if free_bytes < 0:
        held = format_bytes(ours_bytes + others_bytes)
        raise ConfigError(
            f"--device {profile.name} has {format_bytes(total_bytes)}, and runtime and libraries hold {held} before anything is "
            "loaded; name a larger device."
        )
    reading = MemoryReading(
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        ours_bytes=ours_bytes,
        others_bytes=others_bytes,
        limit_source=profile.name,
        known_by="measured" if profile.is_measured else "predicted",
    )
    defaults = host_defaults if profile.host_memory else _device_defaults
    return PlannedPlatform(profile.name, reading, _capabilities(profile), defaults, costs)


def live_platform(platform: Platform) -> PlannedPlatform:
    """A device that is there, as it is now: plans made from it touch it no more."""
    defaults = platform.default_limits()
    costs = platform.start_costs()
    return PlannedPlatform(
        platform.name, platform.reading(), platform.capabilities, lambda free_bytes: defaults, costs, platform.reasons
    )


def allocator_bytes(sizes: Sequence[int]) -> int:
    """What torch's allocator takes from a device to hold these at once, allocated in this order: whole segments.

    Example: 1.03 MiB, 0.5 MiB and 0.5 MiB take a segment of 20 MiB and one of 2 MiB."""
    allocator = ScriptedAllocator(ScriptedDevice(script=DeviceScript(total_bytes=_ENDLESS_BYTES)))
    held = [allocator.allocate(num_bytes) for num_bytes in sizes]
    return allocator.reserved_bytes if held else 0


def _device_defaults(free_bytes: int) -> PlatformDefaults:
    return device_defaults(free_bytes, is_integrated=False)


def _capabilities(profile: DeviceProfile) -> Capabilities:
    host, virtual = profile.host_memory, profile.virtual_memory
    return Capabilities(
        host_memory=host,
        reserve_commit=virtual,
        arena_backend=("mmap" if host else "virtual") if virtual else "static",
        granularity_bytes=profile.costs.of("granularity_bytes"),
        graphs=profile.graphs and not host,
        graph_modes=ALL_MODES if profile.graphs and not host else NO_MODES,
        trusted_readings=True,
        resettable_peak=True,
        cap_enforced=not host,
        over_allocation_kills=host,
        async_tokens=not host,
        dtypes=profile.dtypes,
    )
