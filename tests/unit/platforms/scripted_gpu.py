"""A scripted GPU: the truth about its memory, stand-ins for torch.cuda and pynvml that tell of it, and a platform over them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.unit.platforms.scripted_driver import ScriptedDriver

from brim.platforms.cuda import CudaPlatform
from brim.platforms.cuda_driver import CudaDriver
from brim.platforms.nvml import Nvml
from brim.units import GIB, MIB

PID = os.getpid()
UUID = "6e2b0c1a-0000-4000-8000-000000000001"
TOTAL_BYTES = 81_079 * MIB  # of an H100, as CUDA reports it
CARVED_OUT_BYTES = 480 * MIB  # what the management library counts and CUDA does not


@dataclass
class ScriptedGpu:
    """ours: owner -> bytes. neighbours: process id -> bytes. calls: driver call -> error code of its next calls."""

    pid: int
    total_bytes: int = TOTAL_BYTES
    context_bytes: int = 520 * MIB
    neighbours: dict[int, int] = field(default_factory=dict)
    ours: dict[str, int] = field(default_factory=dict)
    listed_pid: int | None = None  # under which number we are listed; None: our own
    is_listed: bool = True
    unlisted: dict[str, int] = field(default_factory=dict)  # neighbours that no list shows
    nvml_total_bytes: int | None = None
    uuid_prefix: str = "GPU-"
    refusing_nvml: set[str] = field(default_factory=set)
    unknown_bytes: set[int] = field(default_factory=set)  # pids whose bytes are "not available"
    failing: dict[str, list[int]] = field(default_factory=dict)
    on_context: Any = None  # called when the context appears
    attributes: dict[str, int] = field(default_factory=lambda: {"CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED": 1})

    @property
    def ours_bytes(self) -> int:
        """What this process really holds."""
        return sum(self.ours.values())

    @property
    def free_bytes(self) -> int:
        """What is really free."""
        return self.total_bytes - self.ours_bytes - sum(self.neighbours.values()) - sum(self.unlisted.values())

    def make_context(self) -> None:
        """The first call that needs one."""
        if "context" not in self.ours:
            self.ours["context"] = self.context_bytes
            if self.on_context is not None:
                self.on_context(self)


class ScriptedRuntime:
    """torch.cuda."""

    def __init__(self, gpu: ScriptedGpu, **properties: Any) -> None:
        self.gpu = gpu
        self.fraction = 1.0
        self.peak_reserved_bytes = 0
        self.ended_pools: list[object] = []
        self.captures: list[ScriptedGraph] = []
        self.capture_fails: dict[str, RuntimeError] = {}
        self.entered = 0
        self._pools = 0
        self.pool_users: dict[object, int] = {}
        self._properties = SimpleNamespace(
            **{"name": "Scripted H100", "major": 9, "minor": 0, "uuid": UUID, "multi_processor_count": 132, **properties}
        )
        self.memory = SimpleNamespace(
            _cuda_endAllocateToPool=lambda index, pool: self.ended_pools.append(("end", pool)),
            _cuda_releasePool=lambda index, pool: self.ended_pools.append(("release", pool)),
        )

    def get_device_properties(self, index: int) -> Any:
        return self._properties

    def set_device(self, index: int) -> None:
        self.gpu.make_context()

    def mem_get_info(self, index: int) -> tuple[int, int]:
        self.gpu.make_context()
        return self.gpu.free_bytes, self.gpu.total_bytes

    def memory_reserved(self, index: int) -> int:
        return self.gpu.ours.get("torch", 0)

    def max_memory_reserved(self, index: int) -> int:
        return self.peak_reserved_bytes

    def reset_peak_memory_stats(self, index: int) -> None:
        self.peak_reserved_bytes = self.memory_reserved(index)

    def set_per_process_memory_fraction(self, fraction: float, index: int) -> None:
        assert 0 <= fraction <= 1
        self.fraction = fraction

    def take(self, num_bytes: int) -> bool:
        """Allocate as torch does: whole segments of 2 MiB, refused where they pass the fraction or the device."""
        segments_bytes = -(-num_bytes // (2 * MIB)) * 2 * MIB
        held_bytes = self.gpu.ours.get("torch", 0) + segments_bytes
        if held_bytes > int(self.fraction * self.gpu.total_bytes) or segments_bytes > self.gpu.free_bytes:
            return False
        self.gpu.ours["torch"] = held_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, held_bytes)
        return True

    def empty_cache(self) -> None:
        self.gpu.ours["torch"] = 0

    def synchronize(self, index: int) -> None:
        pass

    def Stream(self, device: int) -> object:
        return SimpleNamespace(device=device)

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        self.entered += 1
        try:
            yield
        finally:
            self.entered -= 1

    def graph_pool_handle(self) -> tuple[int, int]:
        self._pools += 1
        return 0, self._pools

    def CUDAGraph(self) -> ScriptedGraph:
        self.captures.append(ScriptedGraph(self))
        return self.captures[-1]


class ScriptedGraph:
    """torch.cuda.CUDAGraph; begin and end fail as the runtime's script says."""

    def __init__(self, runtime: ScriptedRuntime) -> None:
        self._runtime = runtime
        self.pool: object = None
        self.is_capturing = self.is_ended = False

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local" and self._runtime.entered, "captured beside the worker's stream"
        self.pool = pool
        if self._runtime.pool_users.get(pool) == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self._runtime.pool_users[pool] = self._runtime.pool_users.get(pool, 0) + 1
        self._fail("begin")
        self.is_capturing = True

    def capture_end(self) -> None:
        if not self.is_capturing:
            raise RuntimeError("CUDA error: invalid argument")
        self.is_capturing = False
        self._fail("end")
        self.is_ended = True

    def __del__(self) -> None:
        if self.is_ended:
            self._runtime.pool_users[self.pool] -= 1

    def _fail(self, name: str) -> None:
        if name in self._runtime.capture_fails:
            raise self._runtime.capture_fails[name]


class ScriptedNvml:
    """pynvml. gpu.refusing_nvml names the calls that raise."""

    class NVMLError(Exception):
        """As the library's."""

    def __init__(self, gpu: ScriptedGpu) -> None:
        self._gpu = gpu

    def _check(self, name: str) -> None:
        if name in self._gpu.refusing_nvml:
            raise self.NVMLError(f"{name}: Not Supported")

    def nvmlInit(self) -> None:
        self._check("nvmlInit")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != self._gpu.uuid_prefix + UUID:
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        self._check("nvmlDeviceGetMemoryInfo")
        total_bytes = self._gpu.nvml_total_bytes or self._gpu.total_bytes + CARVED_OUT_BYTES
        return SimpleNamespace(total=total_bytes, free=self._gpu.free_bytes)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        self._check("nvmlDeviceGetComputeRunningProcesses")
        listed = dict(self._gpu.neighbours)
        if self._gpu.ours and self._gpu.is_listed:
            listed[self._gpu.listed_pid or self._gpu.pid] = self._gpu.ours_bytes
        unknown = self._gpu.unknown_bytes
        return [SimpleNamespace(pid=pid, usedGpuMemory=None if pid in unknown else held) for pid, held in listed.items()]

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 13000

    def nvmlDeviceGetEccMode(self, handle: str) -> list[int]:
        self._check("nvmlDeviceGetEccMode")
        return [1, 1]


def small_gpu(pid: int) -> ScriptedGpu:
    """8 GiB, for arenas."""
    return ScriptedGpu(pid, total_bytes=8 * GIB, context_bytes=300 * MIB)


class Opened:
    """A platform over a scripted device, and the stand-ins it was made of."""

    def __init__(
        self,
        gpu: ScriptedGpu | None = None,
        root: Path = Path("/nowhere"),
        nvml: bool = True,
        driver: bool = True,
        **properties: Any,
    ) -> None:
        self.gpu = gpu or ScriptedGpu(PID)
        self.runtime = ScriptedRuntime(self.gpu, **properties)
        self.bindings = ScriptedDriver(self.gpu)
        self.platform = CudaPlatform(
            runtime=self.runtime,
            nvml=Nvml(UUID, ScriptedNvml(self.gpu)) if nvml else None,
            driver=CudaDriver(0, self.bindings) if driver else None,
            root=root,
        )

    @property
    def ours_bytes(self) -> int:
        return self.platform.reading().ours_bytes

    def require_truth(self, slack_bytes: int = 0) -> None:
        """The reading is what the device knows."""
        now = self.platform.reading()
        assert (now.total_bytes, now.free_bytes) == (self.gpu.total_bytes, self.gpu.free_bytes)
        assert abs(now.ours_bytes - self.gpu.ours_bytes) <= slack_bytes, (now, self.gpu.ours)
        assert now.total_bytes == now.free_bytes + now.ours_bytes + now.others_bytes
