"""A scripted device that computes on the host: for tests of memory code without an accelerator. Owns no real memory.

Neighbours come and go, readings lie on demand, allocations beyond the end fail or lose the device as scripted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from brim.errors import DeviceLost, OutOfDeviceMemory
from brim.platforms.base import Capabilities, MemoryReading, Platform, PlatformDefaults
from brim.units import GIB, MIB, format_bytes

Lie = Callable[[MemoryReading], MemoryReading]


@dataclass(slots=True)
class FakeDevice:
    """The truth about the device. ours: owner -> bytes; neighbours: name -> bytes."""

    total_bytes: int = 16 * GIB
    ours: dict[str, int] = field(default_factory=lambda: {"context": 300 * MIB})
    neighbours: dict[str, int] = field(default_factory=dict)
    over_allocation_loses: bool = False
    lost: bool = False

    @property
    def ours_bytes(self) -> int:
        """What this process really holds."""
        return sum(self.ours.values())

    @property
    def free_bytes(self) -> int:
        """What is really free."""
        return self.total_bytes - self.ours_bytes - sum(self.neighbours.values())

    def take(self, owner: str, num_bytes: int) -> None:
        """Allocate, or give back where negative. Raises OutOfDeviceMemory or DeviceLost as scripted."""
        if self.lost:
            raise DeviceLost("The fake device was lost.")
        if num_bytes > max(0, self.free_bytes):  # what is given back always can be
            if self.over_allocation_loses:
                self.lost = True
                raise DeviceLost(f"The fake device was lost when {owner} asked for {format_bytes(num_bytes)}.")
            raise OutOfDeviceMemory(f"{owner} asked for {format_bytes(num_bytes)} with {format_bytes(self.free_bytes)} free.")
        held_bytes = self.ours.get(owner, 0) + num_bytes
        assert held_bytes >= 0, f"{owner} gave back more than it held"
        self.ours[owner] = held_bytes


class FakePlatform(Platform):
    """A platform over a FakeDevice. `lie` turns a true reading into what the driver claims."""

    name = "fake"

    def __init__(
        self,
        device: FakeDevice,
        *,
        lie: Lie | None = None,
        granularity_bytes: int = 2 * MIB,
        reserve_commit: bool = True,
        host_memory: bool = False,
    ) -> None:
        super().__init__()
        self.device = device
        self.lie = lie
        self._peak_bytes = device.ours_bytes
        self.capabilities = Capabilities(
            host_memory=host_memory,
            reserve_commit=reserve_commit,
            arena_backend="mmap" if reserve_commit else "static",
            granularity_bytes=granularity_bytes,
            graphs=False,
            graph_modes=("NONE",),
            trusted_readings=lie is None,
            resettable_peak=True,
            cap_enforced=True,
            over_allocation_kills=device.over_allocation_loses,
            async_tokens=False,
            dtypes=("float32", "bfloat16"),
        )

    def take(self, owner: str, num_bytes: int) -> None:
        """Allocate on the device as the framework's allocator would: the cap is enforced."""
        if num_bytes > 0 and self.cap_bytes is not None and self.device.ours_bytes + num_bytes > self.cap_bytes:
            raise OutOfDeviceMemory(
                f"{owner} asked for {format_bytes(num_bytes)} over the cap of {format_bytes(self.cap_bytes)}."
            )
        self.device.take(owner, num_bytes)
        self._peak_bytes = max(self._peak_bytes, self.device.ours_bytes)

    def account(self, delta_bytes: int) -> None:
        """Arenas hold real host memory for their content; the scripted device pays for it."""
        self.take("arena", delta_bytes)
        self._arena_bytes += delta_bytes

    def reading(self) -> MemoryReading:
        """The truth, or what `lie` makes of it."""
        device = self.device
        true = MemoryReading(
            total_bytes=device.total_bytes,
            free_bytes=device.free_bytes,
            ours_bytes=device.ours_bytes,
            others_bytes=sum(device.neighbours.values()),
            limit_source="device",
        )
        return true if self.lie is None else self.lie(true)

    def reset_peak(self) -> None:
        """Peak counts from now."""
        self._peak_bytes = self.device.ours_bytes

    def peak_ours_bytes(self) -> int:
        """The most held since reset_peak."""
        return self._peak_bytes

    def synchronize(self) -> None:
        """Nothing is queued."""

    def default_limits(self) -> PlatformDefaults:
        """An accelerator's: take all that is free less a small reserve."""
        return PlatformDefaults(
            max_num_seqs=64,
            max_num_batched_tokens=2048,
            max_model_len_cap=0,
            memory="max",
            reserve_bytes=256 * MIB,
            context_bytes=300 * MIB,
        )

    def describe(self) -> dict[str, object]:
        """Its script, in short."""
        return {"platform": self.name, "device": "scripted", "total_bytes": self.device.total_bytes}
