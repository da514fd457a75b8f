"""Scripted stand-ins for the HIP runtime's C functions and for amdsmi, over the truth that a ScriptedGpu tells."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tests.unit.platforms.scripted_gpu import PID, ScriptedGpu, ScriptedRuntime

from brim.platforms.amdsmi import Amdsmi
from brim.platforms.hip_driver import HipDriver
from brim.platforms.rocm import RocmPlatform
from brim.units import MIB

BUS_ID = "0000:03:00.0"
UNIT_BYTES = 2 * MIB


class AmdSmiException(Exception):
    """The library's own error."""


@dataclass
class ScriptedHip:
    """libamdhip64: reads ctypes arguments, writes through references. codes: call -> error of every call."""

    gpu: ScriptedGpu
    version: int = 71_260_850
    supported: int = 1
    codes: dict[str, int] = field(default_factory=dict)
    ranges: dict[int, int] = field(default_factory=dict)
    handles: dict[int, int] = field(default_factory=dict)
    mapped: dict[int, tuple[int, int]] = field(default_factory=dict)
    accessible: set[int] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("hip"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if self.codes.get(name):
                return self.codes[name]
            return getattr(self, f"_{name}", lambda *_: 0)(*arguments) or 0

        return call

    def _hipRuntimeGetVersion(self, out: Any) -> None:
        out._obj.value = self.version

    def _hipDeviceGetPCIBusId(self, text: Any, size: Any, index: Any) -> None:
        text.value = BUS_ID.upper().encode()

    def _hipDeviceGetAttribute(self, out: Any, kind: Any, index: Any) -> None:
        out._obj.value = self.supported if kind.value == 89 else 0

    def _hipMemGetAllocationGranularity(self, out: Any, prop: Any, option: Any) -> None:
        assert (prop._obj.type, prop._obj.location.type, option.value) == (1, 1, 0)
        out._obj.value = UNIT_BYTES

    def _hipMemAddressReserve(self, out: Any, size: Any, alignment: Any, wanted: Any, flags: Any) -> None:
        assert wanted.value is None and flags.value == 0 and alignment.value == 0
        out._obj.value = max(self.ranges, default=1 << 40) + (1 << 36)
        self.ranges[out._obj.value] = size.value

    def _hipMemAddressFree(self, address: Any, size: Any) -> None:
        assert self.ranges.pop(address.value) == size.value

    def _hipMemCreate(self, out: Any, size: Any, prop: Any, flags: Any) -> int:
        if size.value > self.gpu.free_bytes:
            return 2
        out._obj.value = max(self.handles, default=1 << 20) + 1
        self.handles[out._obj.value] = size.value
        self.gpu.ours["handles"] = sum(self.handles.values())
        return 0

    def _hipMemRelease(self, handle: Any) -> None:
        assert handle.value not in {held for held, _ in self.mapped.values()}, "released only once unmapped"
        del self.handles[handle.value]
        self.gpu.ours["handles"] = sum(self.handles.values())

    def _hipMemMap(self, address: Any, size: Any, offset: Any, handle: Any, flags: Any) -> int:
        if offset.value or size.value != self.handles[handle.value]:
            return 1
        self.mapped[address.value] = (handle.value, size.value)
        return 0

    def _hipMemSetAccess(self, address: Any, size: Any, access: Any, count: Any) -> int:
        assert (access._obj.location.type, access._obj.flags, count.value) == (1, 3, 1)
        self.accessible.add(address.value)
        return 0

    def _hipMemUnmap(self, address: Any, size: Any) -> int:
        if address.value not in self.mapped or self.mapped[address.value][1] != size.value:
            return 1
        del self.mapped[address.value]
        return 0


@dataclass
class ScriptedAmdsmi:
    """amdsmi over a gpu. refusing: calls that raise. total_bytes: what it takes the device for; None: the truth."""

    gpu: ScriptedGpu
    refusing: set[str] = field(default_factory=set)
    total_bytes: int | None = None
    used_more_bytes: int = 0
    handles: tuple[str, ...] = ("0000:83:00.0", BUS_ID)
    listed: Any = None  # instead of the truth
    AmdSmiMemoryType: Any = field(default_factory=lambda: SimpleNamespace(VRAM=0))

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("amdsmi_") and name in self.refusing:
            raise AmdSmiException(name)
        return object.__getattribute__(self, name)

    def amdsmi_init(self) -> None: ...

    def amdsmi_get_processor_handles(self) -> list[str]:
        return list(self.handles)

    def amdsmi_get_gpu_device_bdf(self, handle: str) -> str:
        return handle

    def amdsmi_get_gpu_memory_total(self, handle: str, kind: int) -> int:
        return self.total_bytes or self.gpu.total_bytes

    def amdsmi_get_gpu_memory_usage(self, handle: str, kind: int) -> int:
        return self.gpu.total_bytes - self.gpu.free_bytes + self.used_more_bytes

    def amdsmi_get_gpu_process_list(self, handle: str) -> Any:
        if self.listed is not None:
            return self.listed
        held = {**self.gpu.neighbours, PID: self.gpu.ours_bytes}
        return [{"pid": pid, "name": "N/A", "mem": n, "memory_usage": {"vram_mem": n}} for pid, n in held.items() if n]

    def amdsmi_get_gpu_driver_info(self, handle: str) -> dict[str, str]:
        return {"driver_name": "amdgpu", "driver_version": "6.16.6"}


class RocmRuntime(ScriptedRuntime):
    """torch.cuda of a HIP build. free_bytes: the lie that mem_get_info tells."""

    free_bytes: int | None = None

    def mem_get_info(self, index: int) -> tuple[int, int]:
        free_bytes, total_bytes = super().mem_get_info(index)
        return (free_bytes if self.free_bytes is None else self.free_bytes), total_bytes


@dataclass
class OpenedRocm:
    """A ROCm platform with what it stands on."""

    gpu: ScriptedGpu
    runtime: RocmRuntime
    hip: ScriptedHip
    amdsmi: ScriptedAmdsmi
    platform: RocmPlatform


def open_scripted(
    gpu: ScriptedGpu | None = None,
    root: Path = Path("/nonexistent"),
    *,
    with_library: bool = True,
    with_driver: bool = True,
    **script: Any,
) -> OpenedRocm:
    """script: hip_* and smi_* set fields of the scripted libraries, the rest are device properties."""
    gpu = gpu or ScriptedGpu(PID)
    hip = ScriptedHip(gpu, **{key[4:]: script.pop(key) for key in list(script) if key.startswith("hip_")})
    smi = ScriptedAmdsmi(gpu, **{key[4:]: script.pop(key) for key in list(script) if key.startswith("smi_")})
    defaults = {"gcnArchName": "gfx942:sramecc+:xnack-", "total_memory": gpu.total_bytes, "is_integrated": 0}
    runtime = RocmRuntime(gpu, **{**defaults, **script})
    driver = HipDriver(0, hip)
    platform = RocmPlatform(
        0,
        runtime=runtime,
        library=Amdsmi(driver.bus_id(), smi) if with_library else None,
        driver=driver if with_driver else None,
        root=root,
        zeros=lambda num_bytes, device: torch.zeros(num_bytes, dtype=torch.uint8),
    )
    return OpenedRocm(gpu, runtime, hip, smi, platform)
