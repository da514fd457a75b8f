"""What accelerators that torch drives have in common. Owns streams, captures, the cap on torch's allocator and peaks.

A platform adds what its device reports (`_device_memory`), what it can do (`_find_capabilities`) and what its errors mean;
graphs and views of memory are torch.cuda's, as on HIP, where it does not say otherwise. Memory that torch's allocator does not
hold is counted by `ProcessShare` and by the arenas' own account.
Source: torch.cuda and torch.xpu, "Memory management", "Streams and events" and "Graphs".
"""

from __future__ import annotations

import gc
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

from brim.config.schema import GraphMode
from brim.errors import BrimError, DeviceError, DeviceLost, OutOfDeviceMemory, first_line
from brim.platforms.base import (
    Capabilities,
    DeviceGraph,
    Marker,
    MemoryReading,
    Platform,
    PlatformDefaults,
    default_reserve_bytes,
)
from brim.platforms.cgroup import CgroupMemory
from brim.platforms.device_view import DeviceArray
from brim.platforms.process_share import CONTEXT_BYTES, ProcessShare
from brim.platforms.procfs import ProcFiles, read_text
from brim.units import MIB

RESERVE_BYTES = 256 * MIB
SEGMENT_BYTES = 2 * MIB  # torch's allocator takes memory from the device in multiples of this
ALL_MODES: tuple[GraphMode, ...] = ("NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")
NO_MODES: tuple[GraphMode, ...] = ("NONE",)
Zeros = Callable[[int, torch.device], torch.Tensor]


def torch_zeros(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Zeroed bytes from torch's allocator."""
    return torch.zeros(num_bytes, dtype=torch.uint8, device=device)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What the device reports, made sane. complaint: why that is not to be trusted, "" where it is."""

    free_bytes: int
    total_bytes: int
    source: str = "device"
    complaint: str = ""


class TorchPlatform(Platform):
    """One device behind `runtime` (torch.cuda, torch.xpu or a scripted stand-in). zeros allocates where torch would.

    root is where /proc and /sys are looked for. A subclass calls `_start` once it knows its device.
    """

    device_type = "cuda"
    pool_calls: tuple[str, ...] = ("_cuda_endAllocateToPool", "_cuda_releasePool")
    counts_page_cache = False  # where memory is the host's, what the device calls free leaves out what the kernel would give back
    _share: ProcessShare

    def __init__(self, index: int, runtime: Any, root: Path, zeros: Zeros = torch_zeros) -> None:
        super().__init__()
        self._index = index
        self._runtime = runtime
        self._zeros = zeros
        self._proc, self._cgroup = ProcFiles(root), CgroupMemory(root)
        self._is_wsl = "microsoft" in (read_text(root / "proc/version") or "").lower()
        self._properties = runtime.get_device_properties(index)
        self._is_integrated = False
        self._peak_bytes = 0

    def _start(self, share: ProcessShare) -> None:
        self._share = share
        self._stream = self._runtime.Stream(device=self._index)
        self._pool: Any = None
        self._in_pool: WeakSet[Any] = WeakSet()  # graphs
        self._broken: list[Any] = []
        self.capabilities = self._find_capabilities()
        self.reset_peak()

    @abstractmethod
    def _device_memory(self) -> DeviceMemory:
        """What the device reports now."""

    @abstractmethod
    def _find_capabilities(self) -> Capabilities:
        """What device and software can do."""

    def _new_graph(self) -> Any:
        """A graph that records nothing yet. Raises RuntimeError."""
        return self._runtime.CUDAGraph()

    def _begin(self, graph: Any) -> None:
        """Record the current stream from now on. Raises RuntimeError."""
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    @abstractmethod
    def _is_lost(self, first_line: str) -> bool:
        """Whether an error that begins so means that the device is gone."""

    def _new_pool(self) -> Any:
        return self._runtime.graph_pool_handle()

    # -- readings

    def reading(self) -> MemoryReading:
        """What the device reports, and our share of it."""
        memory = self._device_memory()
        free_bytes, total_bytes, source = memory.free_bytes, memory.total_bytes, memory.source
        ours_bytes, note = self._share.read(free_bytes, self._arena_beside_bytes())
        if not self._share.is_listed or note:
            source += ", our share by our own account"
        if self._is_integrated:
            available_bytes = min(self._host_available(), total_bytes)
            if self.counts_page_cache or available_bytes < free_bytes:
                free_bytes, source = available_bytes, "memory available on the host"
        else:
            ours_bytes = min(ours_bytes, total_bytes - free_bytes)
        self._peak_bytes = max(self._peak_bytes, ours_bytes)
        return MemoryReading(
            total_bytes=total_bytes,
            free_bytes=free_bytes,
            ours_bytes=ours_bytes,
            others_bytes=max(0, total_bytes - free_bytes - ours_bytes),
            limit_source=source,
            trusted=not memory.complaint,
            reason="; ".join(filter(None, (memory.complaint, note))),
        )

    def _arena_beside_bytes(self) -> int:
        """What arenas hold that is not the allocator's; before the first arena there are no capabilities to ask."""
        return self.arena_bytes if self.arena_bytes and self.capabilities.reserve_commit else 0

    def _host_available(self) -> int:
        """What the host could still give: MemAvailable and every control group's limit."""
        available_bytes = self._proc.meminfo().get("MemAvailable", 1 << 62)
        limits, _ = self._cgroup.limits()
        rooms = [limit.limit_bytes - limit.used_bytes for limit in limits if limit.used_bytes is not None]
        return max(0, min([available_bytes, *rooms]))

    def _host_total(self) -> int:
        """The least limit on what the host has."""
        installed_bytes = self._proc.meminfo().get("MemTotal", 1 << 62)
        limits, _ = self._cgroup.limits()
        return min([installed_bytes, *(limit.limit_bytes for limit in limits)])

    def reset_peak(self) -> None:
        """The allocator's own high-water mark starts anew, and so do the samples; what it may still take is derived anew too."""
        self._peak_bytes = 0
        self._mark_peak(self.reading().ours_bytes)
        if self.cap_bytes is not None:
            self._limit_allocator(self._beside_allocator_bytes())

    def peak_ours_bytes(self) -> int:
        """The most of: every reading since the reset, and what the allocator held at its highest beside the arenas of then."""
        self.reading()
        self._fold_peak()
        return self._peak_bytes

    def _mark_peak(self, ours_bytes: int) -> None:
        """The allocator's mark starts anew, over ours_bytes held in all: at a reset, and whenever an arena moves."""
        self._runtime.reset_peak_memory_stats(self._index)
        self._reserved_at_mark_bytes = self._reserved_bytes()
        self._ours_at_mark_bytes = ours_bytes

    def _fold_peak(self) -> None:
        grown_bytes = int(self._runtime.max_memory_reserved(self._index)) - self._reserved_at_mark_bytes
        self._peak_bytes = max(self._peak_bytes, self._ours_at_mark_bytes + max(0, grown_bytes))

    def _reserved_bytes(self) -> int:
        return int(self._runtime.memory_reserved(self._index))

    # -- the cap

    def set_cap(self, cap_bytes: int) -> None:
        """Also on torch's allocator: what the cap leaves beside everything that is not the allocator's."""
        super().set_cap(cap_bytes)
        self._limit_allocator(self._beside_allocator_bytes())

    def account(self, delta_bytes: int) -> None:
        """An arena takes or gives; what the allocator may hold moves the other way, where it is not the source."""
        if not self.capabilities.reserve_commit:
            super().account(delta_bytes)
            return
        self._fold_peak()
        before_bytes = self._beside_allocator_bytes()  # our own account holds delta_bytes from the next line on
        super().account(delta_bytes)
        beside_bytes = before_bytes + delta_bytes if delta_bytes > 0 else self._beside_allocator_bytes()
        self._mark_peak(beside_bytes + self._reserved_bytes())
        if self.cap_bytes is not None:
            self._limit_allocator(beside_bytes)

    def _beside_allocator_bytes(self) -> int:
        return int(self.reading().ours_bytes - self._reserved_bytes())

    def _allocator_total_bytes(self) -> int:
        """What the allocator takes a fraction of."""
        _, total_bytes = self._runtime.mem_get_info(self._index)
        return int(total_bytes)

    def _limit_allocator(self, beside_bytes: int) -> None:
        """The allocator may hold what the cap leaves when beside_bytes are held outside it; never less than it holds now."""
        assert self.cap_bytes is not None, "there is a cap to enforce"
        if not self.capabilities.cap_enforced:
            return
        reserved_bytes, total_bytes = self._reserved_bytes(), self._allocator_total_bytes()
        allowed_bytes = self.cap_bytes - beside_bytes
        # whole segments and half of one more: the fraction is rounded on its way, and a segment comes whole or not at all
        allowed_bytes = max(reserved_bytes, allowed_bytes) // SEGMENT_BYTES * SEGMENT_BYTES + SEGMENT_BYTES // 2
        allowed_bytes = min(total_bytes, allowed_bytes)
        self._runtime.set_per_process_memory_fraction(allowed_bytes / total_bytes, self._index)

    # -- work

    def torch_device(self) -> torch.device:
        """The device by its index."""
        return torch.device(self.device_type, self._index)

    def stream(self) -> AbstractContextManager[Any]:
        """One stream beside the default one: graphs cannot be captured on that."""
        context: AbstractContextManager[Any] = self._runtime.stream(self._stream)
        return context

    def synchronize(self) -> None:
        """Wait for the device."""
        self._runtime.synchronize(self._index)

    def mark(self) -> Marker:
        """An event on the worker's stream."""
        event = self._runtime.Event()
        event.record(self._stream)
        return _EventMarker(event)

    @contextmanager
    def capture(self) -> Iterator[DeviceGraph]:
        """Capture on the worker's own stream: libraries keep one workspace a stream. Nothing runs until the replay."""
        if not self.capabilities.graphs:
            raise DeviceError(f"Platform '{self.name}' captures no graphs: {self.reasons.get('graphs', 'switched off')}")
        with self.stream():
            graph = self._new_graph()
            if not self._in_pool:  # a pool whose graphs are all gone is dead: torch refuses it
                self._pool = self._new_pool()
            self._in_pool.add(graph)
            try:
                self._begin(graph)
            except RuntimeError as error:
                self._abandon(graph)
                raise self._capture_error(error) from error
            try:
                yield graph
            except BaseException as error:
                if self._abandon(graph) and isinstance(error, RuntimeError):  # the work broke the capture
                    raise self._capture_error(error) from error
                raise
            try:
                graph.capture_end()
            except RuntimeError as error:
                self._forget_pool(graph)
                raise self._capture_error(error) from error

    def _abandon(self, graph: Any) -> bool:
        """End a capture that failed. True where the capture itself was broken: what it began is then undone here."""
        try:
            graph.capture_end()
        except RuntimeError:
            self._forget_pool(graph)
            return True
        return False

    def _forget_pool(self, graph: Any) -> None:
        """After a capture that could not be ended torch's allocator would go on recording into the pool for ever.

        Private calls, those that torch's use_mem_pool ends with (torch.cuda.memory has them, for torch.xpu only torch._C);
        where they are gone or refuse, nothing is worse than before.
        The pool is released only where it was still recording: a graph that got further holds it and releases it itself, and
        twice would take it from the graphs that share it.
        The graph itself stays: torch's allocator of page-locked memory goes on asking it which allocations are its own.
        """
        self._broken.append(graph)
        pool, self._in_pool = self._pool, WeakSet()
        with suppress(RuntimeError, AttributeError):
            for name in self.pool_calls:
                (getattr(self._runtime.memory, name, None) or getattr(torch._C, name))(self._index, pool)

    def _capture_error(self, error: RuntimeError) -> BrimError:
        return self.as_brim_error(error) or DeviceError(f"The work cannot be captured as a graph: {first_line(error)}")

    def memory_view(self, address: int, num_bytes: int) -> torch.Tensor:
        """Through the array interface: the first page must be backed by memory, the others may be later."""
        return torch.as_tensor(DeviceArray(address, num_bytes), device=self.torch_device())

    def plain_memory(self, num_bytes: int) -> tuple[int, Any] | None:
        """From torch's allocator, zeroed."""
        try:
            memory = self._zeros(num_bytes, self.torch_device())
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemory(f"{num_bytes} bytes cannot be allocated: {first_line(error)}") from error
        return memory.data_ptr(), memory

    def release_unused(self) -> int:
        """Collect garbage and empty torch's cache."""
        before_bytes = self.reading().ours_bytes
        gc.collect()
        self._runtime.empty_cache()
        return max(0, before_bytes - self.reading().ours_bytes)

    def as_brim_error(self, error: BaseException) -> BrimError | None:
        """Also errors that the libraries raise as plain RuntimeErrors. Work that a capture forbids has not lost the device."""
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            first = first_line(error)
            if is_out_of_memory(first):
                return OutOfDeviceMemory(f"The device is out of memory: {first}")
            if "captur" in first.lower():
                return DeviceError(f"The work cannot be captured as a graph: {first}")
            if self._is_lost(first):
                return DeviceLost(f"The device failed and this process can no longer use it: {first}")
        return super().as_brim_error(error)

    # -- what it is

    def default_limits(self) -> PlatformDefaults:
        """See device_defaults."""
        return device_defaults(self.reading().free_bytes, is_integrated=self._is_integrated)

    def _describe_share(self, now: MemoryReading) -> dict[str, object]:
        """What every platform says of its readings."""
        return {
            "total_bytes": now.total_bytes,
            "limit_source": now.limit_source,
            "trusted_readings": now.trusted,
            "untrusted_because": now.reason if not now.trusted else "",
            "ours_read_from": self._share.source,
            "context_bytes": self._share.context_bytes,
            "context_known_by": "measured" if self._share.context_is_measured else "predicted",
            "is_integrated": self._is_integrated,
            "is_wsl": self._is_wsl,
            "virtual_memory": self.reasons.get("reserve_commit", "works"),
            "graphs": self.reasons.get("graphs", "work"),
        }


def device_defaults(free_bytes: int, *, is_integrated: bool) -> PlatformDefaults:
    """All that is free less 256 MiB; where memory is the host's (is_integrated), no more than is needed."""
    return PlatformDefaults(
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        max_model_len_cap=0,
        memory="enough" if is_integrated else "max",
        reserve_bytes=default_reserve_bytes(free_bytes) if is_integrated else RESERVE_BYTES,
        context_bytes=CONTEXT_BYTES,
    )


class _EventMarker:
    """Waits for one event."""

    def __init__(self, event: Any) -> None:
        self.wait = event.synchronize


def is_out_of_memory(text: str) -> bool:
    """Whether a library's message means that memory is short, in the words of the libraries that torch calls."""
    return any(words in text for words in ("out of memory", "ALLOC_FAILED", "OUT_OF_DEVICE_MEMORY", "OUT_OF_HOST_MEMORY"))
