"""The CUDA platform: one NVIDIA device as this process sees it. Owns which reading is right for the kind of device it is.

    plain GPU     total and free from the runtime; ours from the management library's list of processes
    MIG slice     the same, of the slice; the management library's own total is the whole card's and is not used
    container     nothing special but for the list, which may not know our process id: see cuda_share
    WSL           no list and no virtual memory calls; over-allocation spills to the host instead of failing: untrusted
    integrated    memory is the host's: free is the least of CUDA's figure, MemAvailable and what control groups leave. CUDA
                  counts page cache as used there, which errs to the safe side

Source: CUDA runtime API cudaMemGetInfo; torch.cuda memory management and CUDAGraph; NVML reference.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from brim.config.schema import GraphMode
from brim.errors import BrimError, DeviceError, DeviceLost, OutOfDeviceMemory
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
from brim.platforms.cuda_driver import CudaDriver
from brim.platforms.cuda_share import CONTEXT_BYTES, ProcessShare
from brim.platforms.nvml import Nvml
from brim.platforms.procfs import ProcFiles, read_text
from brim.units import MIB

RESERVE_BYTES = 256 * MIB
SEGMENT_BYTES = 2 * MIB  # torch's allocator takes memory from the device in multiples of this
_SPILLS = "under WSL taking too much spills to the host's memory instead of failing, and free is a budget that moves"
_LOST_PREFIXES = ("CUDA error", "Triton Error [CUDA]")
_ALL_MODES: tuple[GraphMode, ...] = ("NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")


class CudaPlatform(Platform):
    """`runtime` is torch.cuda, `nvml` and `driver` the parts torch lacks (None: not installed); all may be scripted.

    root is where /proc and /sys are looked for. Construction creates the context and measures it. Raises DeviceError where
    there is no such device.
    """

    name = "cuda"

    def __init__(
        self,
        index: int = 0,
        *,
        runtime: Any = torch.cuda,
        nvml: Nvml | None = None,
        driver: CudaDriver | None = None,
        root: Path = Path("/"),
    ) -> None:
        super().__init__()
        self._index = index
        self._runtime = runtime
        self._nvml = nvml
        self._driver = driver
        self._proc, self._cgroup = ProcFiles(root), CgroupMemory(root)
        self._is_wsl = "microsoft" in (read_text(root / "proc/version") or "").lower()
        self._properties = runtime.get_device_properties(index)
        self._is_integrated = bool(getattr(self._properties, "is_integrated", False))
        self._share = ProcessShare(
            os.getpid(),
            nvml,
            self._create_context,
            lambda: int(runtime.memory_reserved(index)),
            context_exists=bool(driver and driver.has_context()),
            steady_free=not self._is_integrated,
        )
        self._stream = runtime.Stream(device=index)
        self._pool = runtime.graph_pool_handle()
        self.capabilities = self._find_capabilities()
        self._peak_bytes = 0
        self.reset_peak()

    def _create_context(self) -> tuple[int, int]:
        self._runtime.set_device(self._index)
        free_bytes, total_bytes = self._runtime.mem_get_info(self._index)
        return int(free_bytes), int(total_bytes)

    def _find_capabilities(self) -> Capabilities:
        virtual = self._driver is not None and not self._is_wsl
        if virtual and self._driver is not None:
            virtual = bool(self._driver.attribute("CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED"))
        native_bf16 = self._properties.major >= 8
        return Capabilities(
            host_memory=False,
            reserve_commit=virtual,
            arena_backend="cuda" if virtual else "static",
            granularity_bytes=self._driver.granularity_bytes() if virtual and self._driver else 2 * MIB,
            graphs=True,
            graph_modes=_ALL_MODES,
            trusted_readings=not self._is_wsl,
            resettable_peak=True,
            cap_enforced=True,
            over_allocation_kills=self._is_wsl or self._is_integrated,
            async_tokens=True,
            dtypes=("bfloat16", "float16", "float32") if native_bf16 else ("float16", "float32"),
        )

    # -- readings

    def reading(self) -> MemoryReading:
        """Two calls, 40 microseconds on an H100: cheap enough for every few steps."""
        free_bytes, total_bytes = self._runtime.mem_get_info(self._index)
        ours_bytes, reason = self._share.read(free_bytes, self._arena_beside_bytes())
        source = "device" if self._share.is_listed and not reason else "device, our share by our own account"
        if self._is_integrated:
            available_bytes = self._host_available()
            if available_bytes < free_bytes:
                free_bytes, source = available_bytes, "memory available on the host"
        ours_bytes = min(ours_bytes, total_bytes - free_bytes) if not self._is_integrated else ours_bytes
        self._peak_bytes = max(self._peak_bytes, ours_bytes)
        return MemoryReading(
            total_bytes=total_bytes,
            free_bytes=free_bytes,
            ours_bytes=ours_bytes,
            others_bytes=max(0, total_bytes - free_bytes - ours_bytes),
            limit_source=source,
            trusted=not self._is_wsl,
            reason="; ".join(filter(None, (_SPILLS if self._is_wsl else "", reason))),
        )

    def _arena_beside_bytes(self) -> int:
        return self.arena_bytes if self.capabilities.reserve_commit else 0  # static ones are the allocator's

    def _host_available(self) -> int:
        """What the host could still give: MemAvailable and every control group's limit."""
        available_bytes = self._proc.meminfo().get("MemAvailable", 1 << 62)
        limits, _ = self._cgroup.limits()
        rooms = [limit.limit_bytes - limit.used_bytes for limit in limits if limit.used_bytes is not None]
        return max(0, min([available_bytes, *rooms]))

    def reset_peak(self) -> None:
        """The allocator's own high-water mark starts anew, and so do the samples; what it may still take is derived anew too."""
        self._runtime.reset_peak_memory_stats(self._index)
        self._reserved_at_reset_bytes = self._runtime.memory_reserved(self._index)
        self._peak_bytes = 0
        self._ours_at_reset_bytes = self.reading().ours_bytes
        if self.cap_bytes is not None:
            self._limit_allocator(self._beside_allocator_bytes())

    def peak_ours_bytes(self) -> int:
        """The most of: every reading since the reset, and what the allocator held at its highest."""
        grown_bytes = self._runtime.max_memory_reserved(self._index) - self._reserved_at_reset_bytes
        self.reading()
        return max(self._peak_bytes, self._ours_at_reset_bytes + max(0, int(grown_bytes)))

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
        before_bytes = self._beside_allocator_bytes()  # our own account holds delta_bytes from the next line on
        super().account(delta_bytes)
        taken_bytes = max(0, delta_bytes)
        self._peak_bytes = max(self._peak_bytes, before_bytes + self._runtime.memory_reserved(self._index) + taken_bytes)
        if self.cap_bytes is not None:
            self._limit_allocator(before_bytes + taken_bytes if taken_bytes else self._beside_allocator_bytes())

    def _beside_allocator_bytes(self) -> int:
        return int(self.reading().ours_bytes - self._runtime.memory_reserved(self._index))

    def _limit_allocator(self, beside_bytes: int) -> None:
        """The allocator may hold what the cap leaves when beside_bytes are held outside it; never less than it holds now."""
        assert self.cap_bytes is not None, "there is a cap to enforce"
        reserved_bytes = self._runtime.memory_reserved(self._index)
        _, total_bytes = self._runtime.mem_get_info(self._index)
        allowed_bytes = self.cap_bytes - beside_bytes
        # whole segments and half of one more: the fraction is rounded on its way, and a segment comes whole or not at all
        allowed_bytes = max(reserved_bytes, allowed_bytes) // SEGMENT_BYTES * SEGMENT_BYTES + SEGMENT_BYTES // 2
        allowed_bytes = min(total_bytes, allowed_bytes)
        self._runtime.set_per_process_memory_fraction(allowed_bytes / total_bytes, self._index)

    # -- work

    def torch_device(self) -> torch.device:
        """The device by its index."""
        return torch.device("cuda", self._index)

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
        with self.stream():
            graph = self._runtime.CUDAGraph()
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
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
                self._forget_pool()
                raise self._capture_error(error) from error

    def _abandon(self, graph: Any) -> bool:
        """End a capture that failed. True where the capture itself was broken: what it began is then undone here."""
        try:
            graph.capture_end()
        except RuntimeError:
            self._forget_pool()
            return True
        return False

    def _forget_pool(self) -> None:
        """After a capture that could not be ended torch's allocator would go on recording into the pool for ever.

        Private calls, those that torch.cuda.use_mem_pool ends with; where they are gone or refuse, nothing is worse than before.
        """
        memory, pool = self._runtime.memory, self._pool
        self._pool = self._runtime.graph_pool_handle()
        with suppress(RuntimeError, AttributeError):
            memory._cuda_endAllocateToPool(self._index, pool)
            memory._cuda_releasePool(self._index, pool)

    def _capture_error(self, error: RuntimeError) -> BrimError:
        return self.as_brim_error(error) or DeviceError(f"The work cannot be captured as a graph: {_first_line(error)}")

    def memory_view(self, address: int, num_bytes: int) -> torch.Tensor:
        """Through the array interface: the first page must be backed by memory, the others may be later."""
        return torch.as_tensor(_DeviceArray(address, num_bytes), device=self.torch_device())

    def plain_memory(self, num_bytes: int) -> tuple[int, Any] | None:
        """From torch's allocator, zeroed."""
        try:
            memory = torch.zeros(num_bytes, dtype=torch.uint8, device=self.torch_device())
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemory(f"{num_bytes} bytes cannot be allocated: {str(error).splitlines()[0]}") from error
        return memory.data_ptr(), memory

    def virtual_memory(self) -> CudaDriver:
        """The driver's virtual memory calls."""
        assert self._driver is not None, "only where reserve_commit"
        return self._driver

    def release_unused(self) -> int:
        """Collect garbage and empty torch's cache; later captures take a new pool, for one whose graphs are gone is dead."""
        before_bytes = self.reading().ours_bytes
        gc.collect()
        self._runtime.empty_cache()
        self._pool = self._runtime.graph_pool_handle()
        return max(0, before_bytes - self.reading().ours_bytes)

    def as_brim_error(self, error: BaseException) -> BrimError | None:
        """Also errors that the libraries raise as plain RuntimeErrors. Work that a capture forbids has not lost the device."""
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            first = _first_line(error)
            if "out of memory" in first or "ALLOC_FAILED" in first:
                return OutOfDeviceMemory(f"The device is out of memory: {first}")
            if "captur" in first.lower():
                return DeviceError(f"The work cannot be captured as a graph: {first}")
            if first.startswith(_LOST_PREFIXES) or "CUDA driver error" in first:
                return DeviceLost(f"The device failed and this process can no longer use it: {first}")
        return super().as_brim_error(error)

    # -- what it is

    def default_limits(self) -> PlatformDefaults:
        """All that is free less 256 MiB; where memory is the host's, no more than is needed."""
        free_bytes = self.reading().free_bytes
        return PlatformDefaults(
            max_num_seqs=256,
            max_num_batched_tokens=8192,
            max_model_len_cap=0,
            memory="enough" if self._is_integrated else "max",
            reserve_bytes=default_reserve_bytes(free_bytes) if self._is_integrated else RESERVE_BYTES,
            context_bytes=CONTEXT_BYTES,
        )

    def describe(self) -> dict[str, object]:
        """Name, versions, which kind of device it is and where our share is read."""
        now = self.reading()
        return {
            "platform": self.name,
            "device": self._properties.name,
            "compute_capability": f"{self._properties.major}.{self._properties.minor}",
            "multiprocessors": self._properties.multi_processor_count,
            "uuid": str(getattr(self._properties, "uuid", "unknown")),
            "driver": (self._nvml.driver_version() if self._nvml else None) or "unknown",
            "driver_cuda": (self._nvml.cuda_version() if self._nvml else None) or "unknown",
            "cuda": torch.version.cuda,
            "torch": version("torch"),
            "total_bytes": now.total_bytes,
            "limit_source": now.limit_source,
            "trusted_readings": now.trusted,
            "ours_read_from": self._share.source,
            "ours_bytes": now.ours_bytes,
            "own_account_bytes": self._share.own_account(self._runtime.mem_get_info(self._index)[0], self._arena_beside_bytes()),
            "free_before_context_bytes": self._share.free_before_bytes,
            "free_after_context_bytes": self._share.free_after_bytes,
            "context_bytes": self._share.context_bytes,
            "context_known_by": "measured" if self._share.context_is_measured else "predicted",
            "error_correction": self._nvml.error_correction() if self._nvml else None,
            "is_slice": bool(self._nvml and self._nvml.is_slice),
            "is_integrated": self._is_integrated,
            "is_wsl": self._is_wsl,
        }


class _EventMarker:
    """Waits for one event."""

    def __init__(self, event: Any) -> None:
        self.wait = event.synchronize


class _DeviceArray:
    """Memory at an address, in the form that frameworks exchange (CUDA Array Interface, version 3)."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {"shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def open_cuda() -> CudaPlatform:
    """The first visible CUDA device. Raises DeviceError where torch has none."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        raise DeviceError("No CUDA device: torch was built without CUDA, or the driver shows no device.")
    nvml = driver = None
    try:  # optional parts
        import pynvml

        nvml = Nvml(str(torch.cuda.get_device_properties(0).uuid), pynvml)
    except ImportError:
        pass
    try:
        from cuda.bindings import driver as bindings

        driver = CudaDriver(0, bindings)
    except ImportError:
        pass
    return CudaPlatform(0, nvml=nvml, driver=driver)
