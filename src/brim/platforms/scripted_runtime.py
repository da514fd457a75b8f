"""What a scripted device looks like to a framework: the calls of torch.cuda or torch.xpu that Brim makes, over a script. Owns
which figures are told, right or wrong; a management library beside it; graphs and their memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from brim.platforms.drm_clients import DrmClients
from brim.platforms.scenario import Work
from brim.platforms.scripted_allocator import Block, ScriptedAllocator
from brim.platforms.scripted_device import ScriptedDevice, ScriptedFault

_OTHERS_PID = 1_000_000_000  # beyond every real process id


class ScriptedRuntime:
    """torch.cuda or torch.xpu. `work` is called by whatever plays a kernel."""

    def __init__(self, device: ScriptedDevice) -> None:
        self.device = device
        self.allocator = ScriptedAllocator(device)
        self._pools = 0
        self.pool_users: dict[Any, int] = {}  # graphs in each pool
        self._said_free_bytes: int | None = None
        self._kept: list[Block] = []

    # -- what it is

    def get_device_properties(self, index: int) -> Any:
        """Of a recent device of the kind that is asked for."""
        script = self.device.script
        return SimpleNamespace(
            name="scripted", major=9, minor=0, multi_processor_count=132, uuid="0", total_memory=script.total_bytes,
            is_integrated=script.integrated, is_integrated_gpu=script.integrated, gcnArchName="gfx942", driver_version="1",
            has_bfloat16_conversions=True, has_fp16=True,
        )  # fmt: skip

    def set_device(self, index: int) -> None:
        """The context appears."""
        if "context" not in self.device.ours:
            self.device.take("context", self.device.script.context_bytes)

    def graph_pool_handle(self) -> Any:
        """A new one each time."""
        self._pools += 1
        return (0, self._pools)

    # -- memory

    def mem_get_info(self, index: int) -> tuple[int, int]:
        """(free, total) as the script has it told. Raises RuntimeError where it is not supported."""
        self.set_device(index)
        device, readings = self.device, self.device.script.readings
        free_bytes = device.free_bytes
        if device.script.integrated:
            free_bytes -= device.script.host.page_cache_bytes
        if self._said_free_bytes is None:
            self._said_free_bytes = free_bytes
        if readings.lie == "unsupported":
            raise RuntimeError("The device does not support querying the available free memory")
        told = {
            "stale": self._said_free_bytes,
            "negative": -free_bytes,
            "fixed": readings.free_bytes,
            "absurd": device.total_bytes + free_bytes,
        }
        return told.get(readings.lie, free_bytes), device.total_bytes

    def memory_reserved(self, index: int) -> int:
        """All segments of the allocator."""
        return self.allocator.reserved_bytes

    def max_memory_reserved(self, index: int) -> int:
        """The most since the last reset."""
        return self.allocator.peak_bytes

    def reset_peak_memory_stats(self, index: int) -> None:
        """From now on."""
        self.allocator.peak_bytes = self.allocator.reserved_bytes

    def set_per_process_memory_fraction(self, fraction: float, index: int) -> None:
        """The allocator refuses to hold more."""
        self.allocator.fraction_bytes = int(fraction * self.device.total_bytes)

    def empty_cache(self) -> None:
        """What only the cache holds goes back."""
        self.allocator.empty_cache()

    def zeros(self, num_bytes: int, device: Any = None) -> Block:
        """What stands for a tensor: memory until the last reference goes."""
        return self.allocator.allocate(num_bytes)

    # -- work

    def work(self, kind: Work, rows: int = 1) -> None:
        """This kind of work happens now, over so many rows: consumers take what the script says. Raises OutOfDeviceMemory."""
        for consumer, num_bytes in self.device.due(kind, rows):
            if consumer.source == "allocator":
                block = self.allocator.allocate(num_bytes)
                if consumer.keeps:
                    self._kept.append(block)
                else:
                    block.free()
            else:
                self.device.take(consumer.name, num_bytes)
                if not consumer.keeps:
                    self.device.take(consumer.name, -num_bytes)

    def synchronize(self, index: int = 0) -> None:
        """Nothing is queued."""

    def Stream(self, device: int) -> str:
        """One of them."""
        return "stream"

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        """Entered around work."""
        yield

    def Event(self) -> Any:
        """Is over at once."""
        return SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)

    def CUDAGraph(self) -> ScriptedGraph:
        """Records nothing yet."""
        return ScriptedGraph(self)

    XPUGraph = CUDAGraph

    @property
    def memory(self) -> Any:
        """Pools are only numbers."""
        return SimpleNamespace()


class ScriptedGraph:
    """Its memory is taken when the capture ends and given back with the last reference."""

    def __init__(self, runtime: ScriptedRuntime) -> None:
        self._runtime = runtime
        self._held: dict[str, int] = {}
        self._pool: Any = None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "") -> None:
        """Recording begins. Raises RuntimeError as scripted, and for a pool whose graphs are all gone, as torch does."""
        users = self._runtime.pool_users
        if users.get(pool) == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        try:
            self._runtime.device.check("capture")
        except ScriptedFault as error:
            raise RuntimeError(f"operation failed due to a previous error during capture: {error}") from error
        users[pool] = users.get(pool, 0) + 1
        self._pool = pool

    def capture_end(self) -> None:
        """What graphs take is taken now. Raises OutOfDeviceMemory."""
        device = self._runtime.device
        for consumer, num_bytes in device.due("graph", 1):
            device.take(consumer.name, num_bytes)
            self._held[consumer.name] = self._held.get(consumer.name, 0) + num_bytes

    def replay(self) -> None:
        """The work of a step, without calls of its own."""
        self._runtime.device.check("step")
        self._runtime.work("replay")

    def __del__(self) -> None:
        if self._pool is not None:
            self._runtime.pool_users[self._pool] -= 1
        if not self._runtime.device.lost:
            for name, num_bytes in self._held.items():
                self._runtime.device.take(name, -num_bytes)


class ScriptedClients(DrmClients):
    """The kernel's account of this process."""

    def __init__(self, device: ScriptedDevice) -> None:
        self._device = device

    def held_bytes(self) -> dict[str, int]:
        """True; nothing where the script has no such account."""
        ours_bytes = self._device.ours_bytes
        return {"0000:03:00.0": ours_bytes} if ours_bytes and self._device.script.readings.has_kernel_account else {}


class ScriptedLibrary:
    """A vendor's management library: the driver's own figures and a list of processes."""

    is_slice = False

    def __init__(self, device: ScriptedDevice) -> None:
        self._device = device

    @property
    def _total_bytes(self) -> int:
        return self._device.script.readings.library_total_bytes or self._device.total_bytes

    def free_bytes(self) -> int:
        """True, but of the whole card where the library speaks of that."""
        return self._device.free_bytes + self._total_bytes - self._device.total_bytes

    def is_of(self, total_bytes: int) -> bool:
        """Within 5 %, as the real ones are compared."""
        return abs(self._total_bytes - total_bytes) * 20 <= total_bytes

    def process_bytes(self) -> dict[int, int]:
        """Processes by number; the driver's own share is in no entry."""
        held = {_OTHERS_PID + i: n for i, (name, n) in enumerate(sorted(self._device.neighbours.items())) if name != "driver"}
        if self._device.script.readings.is_listed and self._device.ours_bytes:
            held[os.getpid()] = self._device.ours_bytes
        return held

    def driver_version(self) -> str:
        """Of no driver."""
        return "scripted"

    def cuda_version(self) -> None:
        """Of none."""
        return

    def error_correction(self) -> None:
        """Not known."""
        return
