"""A stand-in for cuda.bindings.driver: the virtual memory of a scripted GPU, with content that can be written and read.

It is strict: it refuses to unmap part of a handle, to map over something, to free a range that is not empty, and asserts
that nothing is unmapped before the device was waited for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from brim.units import MIB

if TYPE_CHECKING:
    from tests.unit.platforms.scripted_gpu import ScriptedGpu

OUT_OF_MEMORY, INVALID_VALUE = 2, 1


@dataclass
class _Handle:
    num_bytes: int
    address: int = 0  # 0: not mapped
    may_access: bool = False
    content: dict[int, int] = field(default_factory=dict)  # offset -> value


class ScriptedDriver:
    """cuda.bindings.driver over a gpu: virtual memory with content that can be written and read by address."""

    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)
    granularity_bytes = 2 * MIB

    def __init__(self, gpu: ScriptedGpu) -> None:
        self.gpu = gpu
        self.ranges: dict[int, int] = {}
        self.handles: dict[int, _Handle] = {}
        self.is_idle = True
        self.context = 7
        self._next = 1 << 40
        self.CUdevice_attribute = SimpleNamespace(**{name: name for name in gpu.attributes})

    def CUmemAllocationProp(self) -> Any:
        return SimpleNamespace(location=SimpleNamespace())

    def CUmemAccessDesc(self) -> Any:
        return SimpleNamespace()

    def _fails(self, name: str) -> int:
        codes = self.gpu.failing.get(name) or [0]
        return codes.pop(0)

    def write(self, address: int, value: int) -> None:
        """A kernel writes one byte."""
        self.is_idle = False
        handle, offset = self._at(address)
        handle.content[offset] = value

    def read(self, address: int) -> int | None:
        """What is there; None where nothing was written since the memory was made."""
        handle, offset = self._at(address)
        return handle.content.get(offset)

    def _at(self, address: int) -> tuple[_Handle, int]:
        for handle in self.handles.values():
            if handle.address and handle.address <= address < handle.address + handle.num_bytes:
                assert handle.may_access, "mapped without access"
                return handle, address - handle.address
        raise AssertionError(f"illegal address {address:#x}")

    @property
    def mapped_bytes(self) -> int:
        """Of all ranges."""
        return sum(handle.num_bytes for handle in self.handles.values() if handle.address)

    def _settle(self) -> None:
        self.gpu.ours["arena"] = sum(handle.num_bytes for handle in self.handles.values())

    def cuInit(self, flags: int) -> tuple[int]:
        return (0,)

    def cuDeviceGet(self, index: int) -> tuple[int, int]:
        return 0, index

    def cuDeviceGetAttribute(self, name: str, device: int) -> tuple[int, int]:
        return 0, self.gpu.attributes[name]

    def cuDevicePrimaryCtxGetState(self, device: int) -> tuple[int, int, int]:
        return 0, 0, int("context" in self.gpu.ours)

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[int, int]:
        return 0, 7

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[int]:
        return (0,)

    def cuCtxGetCurrent(self) -> tuple[int, int]:
        return 0, self.context

    def cuCtxSetCurrent(self, context: int) -> tuple[int]:
        self.context = context
        return (0,)

    def cuCtxSynchronize(self) -> tuple[int]:
        code = self._fails("cuCtxSynchronize") or (0 if self.context else 201)
        self.is_idle = True
        return (code,)

    def cuMemGetAllocationGranularity(self, prop: Any, flag: int) -> tuple[int, int]:
        return 0, self.granularity_bytes

    def cuMemAddressReserve(self, num_bytes: int, alignment: int, address: int, flags: int) -> tuple[int, int]:
        if code := self._fails("cuMemAddressReserve"):
            return code, 0
        assert num_bytes % self.granularity_bytes == 0
        self._next += num_bytes + self.granularity_bytes
        start = self._next - num_bytes
        self.ranges[start] = num_bytes
        return 0, start

    def cuMemAddressFree(self, address: int, num_bytes: int) -> tuple[int]:
        inside = [h for h in self.handles.values() if h.address and address <= h.address < address + num_bytes]
        if self.ranges.get(address) != num_bytes or inside:
            return (INVALID_VALUE,)
        del self.ranges[address]
        return (0,)

    def cuMemCreate(self, num_bytes: int, prop: Any, flags: int) -> tuple[int, int]:
        if code := self._fails("cuMemCreate"):
            return code, 0
        assert num_bytes % self.granularity_bytes == 0 and num_bytes
        if num_bytes > self.gpu.free_bytes:
            return OUT_OF_MEMORY, 0
        self._next += 1
        self.handles[self._next] = _Handle(num_bytes)
        self._settle()
        return 0, self._next

    def cuMemRelease(self, handle: int) -> tuple[int]:
        assert not self.handles[handle].address, "released while it is mapped"
        del self.handles[handle]
        self._settle()
        return (0,)

    def cuMemMap(self, address: int, num_bytes: int, offset: int, handle: int, flags: int) -> tuple[int]:
        if code := self._fails("cuMemMap"):
            return (code,)
        taken = [h for h in self.handles.values() if h.address and h.address < address + num_bytes]
        taken = [h for h in taken if address < h.address + h.num_bytes]
        start = next((s for s, size in self.ranges.items() if s <= address and address + num_bytes <= s + size), None)
        if offset or taken or start is None or self.handles[handle].num_bytes != num_bytes:
            return (INVALID_VALUE,)
        self.handles[handle].address = address
        return (0,)

    def cuMemSetAccess(self, address: int, num_bytes: int, access: list[Any], count: int) -> tuple[int]:
        if code := self._fails("cuMemSetAccess"):
            return (code,)
        for handle in self.handles.values():
            if handle.address == address:
                handle.may_access = True
        return (0,)

    def cuMemUnmap(self, address: int, num_bytes: int) -> tuple[int]:
        if code := self._fails("cuMemUnmap"):
            return (code,)
        found = next((h for h in self.handles.values() if h.address == address and h.num_bytes == num_bytes), None)
        if found is None:
            return (INVALID_VALUE,)
        assert self.is_idle or not found.content, "unmapped while the device may still use it"
        found.address, found.may_access = 0, False
        return (0,)
