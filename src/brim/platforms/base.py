"""The platform contract: what the rest of Brim may ask of a device. Owns `Platform`, `Capabilities` and `MemoryReading`.

Nobody outside this package asks for a brand: they ask for a capability and take the weaker part where it is missing.
Torch-free to import; a method that hands out torch objects imports torch itself. Arenas are built by
`memory.arena.factory` from `capabilities.arena_backend`, because memory sits above platforms.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from brim.config.schema import GraphMode, MemoryKind
from brim.errors import BrimError, DeviceError, DeviceLost, OutOfDeviceMemory
from brim.platforms.profile import Known, StartCosts, profile_of, usual_costs
from brim.units import MIB, format_bytes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What the device and its software can do, asked instead of its name."""

    host_memory: bool  # device memory is the host's: page cache, cgroups and MemAvailable apply
    reserve_commit: bool  # addresses can be reserved and backed later
    arena_backend: str  # key of memory.arena.factory, or "module:Class" of a third party
    granularity_bytes: int  # an arena backs whole multiples of this
    graphs: bool  # steps can be captured and replayed
    graph_modes: tuple[GraphMode, ...]  # that work here; ("NONE",) without graphs
    trusted_readings: bool  # free memory moves by what is allocated
    resettable_peak: bool  # the peak can be measured from a chosen moment on
    cap_enforced: bool  # the allocator itself refuses to pass the cap
    over_allocation_kills: bool  # never probe by allocating: the process or the device is lost instead of an error
    async_tokens: bool  # work is queued; the next step reads sampled ids on the device
    dtypes: tuple[str, ...]  # computed natively, best first
    mapped_host: bool = False  # kernels read and write page-locked host memory where it lies


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReading:
    """One reading of the device. total = the least limit that applies to us; others = total - free - ours, at least 0.

    free_bytes: what this process could still take. ours_bytes: what it holds. limit_source: which limit total is.
    An untrusted reading says why in `reason`; our own account and prove then decide. known_by: "predicted" where the device is
    not there.
    """

    total_bytes: int
    free_bytes: int
    ours_bytes: int
    others_bytes: int
    limit_source: str
    trusted: bool = True
    reason: str = ""
    known_by: Known = "measured"

    @property
    def reachable_bytes(self) -> int:
        """The most this process could hold now: what it has plus what is free."""
        return self.ours_bytes + self.free_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformDefaults:
    """What a platform chooses for settings left open. max_model_len_cap 0: the model's own limit."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len_cap: int
    memory: MemoryKind
    reserve_bytes: int
    context_bytes: int  # predicted share of libraries and runtime, where it cannot be measured yet


class Marker(Protocol):
    """A place in the worker's queue of device work."""

    def wait(self) -> None:
        """Return when everything queued before it is done."""


class DeviceGraph(Protocol):
    """Device work captured once; its addresses and sizes are fixed, its values are read from memory at each replay."""

    def replay(self) -> None:
        """Queue all of it on the worker's stream."""


@dataclass(frozen=True, slots=True)
class _WholeQueue:
    wait: Callable[[], None]


class Platform(ABC):
    """One device as this process sees it. Readings are cheap enough for every step; nothing here is global state."""

    name: str
    capabilities: Capabilities

    def __init__(self) -> None:
        self._cap_bytes: int | None = None
        self._arena_bytes = 0
        self.reasons: dict[str, str] = {}  # capability -> why it is missing, in one sentence; empty where nothing is to be said

    @abstractmethod
    def reading(self) -> MemoryReading:
        """Total, free, ours and others', now."""

    @abstractmethod
    def reset_peak(self) -> None:
        """Start a new measurement of the peak: from now on."""

    @abstractmethod
    def peak_ours_bytes(self) -> int:
        """The most this process held since the last reset_peak (or since its start)."""

    @abstractmethod
    def default_limits(self) -> PlatformDefaults:
        """Values for the settings the user left open, from the device as it is now."""

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """Names, versions and sizes for reports: plain JSON values."""

    def start_costs(self) -> StartCosts:
        """What a start here takes that no arithmetic knows: from the profile of this very device, or what is usual."""
        profile = profile_of(str(self.describe().get("device", "")))
        return profile.costs if profile is not None else usual_costs(host_memory=self.capabilities.host_memory)

    def torch_device(self) -> torch.device:
        """Where tensors live."""
        import torch

        return torch.device("cpu")

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until queued work is done. Nothing to do where work is not queued."""

    def restrict(self, **changes: Any) -> None:
        """Do without a capability from now on (a flag, or a feature that killed an earlier start)."""
        self.capabilities = replace(self.capabilities, **changes)

    def stream(self) -> AbstractContextManager[Any]:
        """Entered around every phase and step: all of a worker's work goes through one queue of the device, so that libraries
        keep one workspace and graphs are captured where eager steps run."""
        return nullcontext()

    def mark(self) -> Marker:
        """A marker after all that is queued now. Here one that waits for everything."""
        return _WholeQueue(self.synchronize)

    def capture(self) -> AbstractContextManager[DeviceGraph]:
        """Capture the device work queued inside, which runs only when the graph is replayed; only where capabilities.graphs.

        All graphs of a platform share one memory pool. Raises DeviceError where the work cannot be captured."""
        raise DeviceError(f"Platform '{self.name}' captures no graphs.")

    def memory_view(self, address: int, num_bytes: int) -> torch.Tensor:
        """A uint8 tensor [num_bytes] over memory that somebody else owns, at an address of this device. Host memory here."""
        import torch

        return torch.frombuffer((ctypes.c_ubyte * num_bytes).from_address(address), dtype=torch.uint8)

    def plain_memory(self, num_bytes: int) -> tuple[int, Any] | None:
        """Zeroed device memory from the framework's allocator: its address, and what keeps it. None: allocate host memory.

        Raises OutOfDeviceMemory."""
        return None

    def virtual_memory(self) -> Any:
        """The driver's calls that the platform's arena backend takes; only where that backend needs them."""
        raise DeviceError(f"Platform '{self.name}' has no virtual memory calls.")

    def as_brim_error(self, error: BaseException) -> BrimError | None:
        """What a foreign error raised by device work means: out of memory, a lost device, or None where it is neither."""
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            return OutOfDeviceMemory(f"The device is out of memory: {str(error).splitlines()[0]}")
        if isinstance(error, torch.AcceleratorError):
            return DeviceLost(f"The device failed and this process can no longer use it: {str(error).splitlines()[0]}")
        return None

    def release_unused(self) -> int:
        """Make allocators give back what they cache; returns by how many bytes `ours` fell (0 where it did not)."""
        return 0

    @property
    def cap_bytes(self) -> int | None:
        """The cap this process must keep; None until it is set."""
        return self._cap_bytes

    def set_cap(self, cap_bytes: int) -> None:
        """The most this process may hold from now on. Platforms whose allocator can enforce it override this."""
        self._cap_bytes = cap_bytes

    @property
    def arena_bytes(self) -> int:
        """Our own account of what arenas hold committed."""
        return self._arena_bytes

    def account(self, delta_bytes: int) -> None:
        """An arena is about to take delta_bytes (positive) or has given them back (negative).

        Raises OutOfDeviceMemory, and counts nothing, where taking them would pass the cap or what is free: on a platform
        whose over-allocation kills, this is the only place where an overshoot is still an error.
        """
        if delta_bytes > 0:
            self.ensure_room(delta_bytes)
        self._arena_bytes += delta_bytes

    def ensure_room(self, num_bytes: int) -> None:
        """Raise OutOfDeviceMemory unless num_bytes more would keep the cap and be there."""
        now = self.reading()
        room_bytes, limit = now.free_bytes, now.limit_source
        if self._cap_bytes is not None and self._cap_bytes - now.ours_bytes < room_bytes:
            room_bytes, limit = max(0, self._cap_bytes - now.ours_bytes), f"cap of {format_bytes(self._cap_bytes)}"
        if num_bytes > room_bytes:
            raise OutOfDeviceMemory(
                f"{format_bytes(num_bytes)} more do not fit: {format_bytes(now.ours_bytes)} are held and the {limit} leaves "
                f"{format_bytes(room_bytes)}; lower --max-num-seqs or --max-model-len, or raise --memory."
            )

    def pressure_bytes(self, reserve_bytes: int) -> int:
        """How far free memory is under the reserve (positive), or how much could be taken again (negative)."""
        now = self.reading()
        room_bytes = now.free_bytes - reserve_bytes
        if self._cap_bytes is not None:
            room_bytes = min(room_bytes, self._cap_bytes - now.ours_bytes)
        return -room_bytes


def default_reserve_bytes(free_bytes: int) -> int:
    """What stays free on shared host memory: 5 % of what is available, at least 512 MiB.

    Example: 20 GiB available: 1 GiB.
    """
    return max(512 * MIB, free_bytes // 20)
