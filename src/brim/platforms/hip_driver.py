"""The few calls of the HIP runtime that torch does not offer: virtual memory, versions and addresses. Owns their errors.

The library is the one that torch has loaded: two HIP runtimes in one process do not share devices. Virtual memory is used from
7.12 on: before, hipMemSetAccess refuses ranges that do not begin a reservation and hipMemMap wants offset 0.
Written against the documentation; never run on the hardware.
Source: HIP runtime API reference, "Virtual Memory Management" (hipMemAddressReserve, hipMemCreate, hipMemMap, hipMemSetAccess);
hip_runtime_api.h for the layout of hipMemAllocationProp and hipMemAccessDesc.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from brim.errors import DeviceError, DeviceLost, OutOfDeviceMemory
from brim.platforms.procfs import ProcFiles
from brim.units import format_bytes

LEAST_VIRTUAL_VERSION = (7, 12)
_OUT_OF_MEMORY = 2  # hipErrorOutOfMemory
_LOST = frozenset({214, 700, 709, 710, 719})  # ECC, illegal address, context destroyed, assert, launch failure
_VIRTUAL_MEMORY_SUPPORTED = 89  # hipDeviceAttributeVirtualMemoryManagementSupported
_PINNED, _ON_DEVICE, _READ_WRITE, _MINIMUM = 1, 1, 3, 0
_NAMES = ("libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6")


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_uint32), ("id", ctypes.c_int))


class _AllocationProp(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("requested_handle_type", ctypes.c_uint32),
        ("location", _Location),
        ("win32_meta_data", ctypes.c_void_p),
        ("compression_type", ctypes.c_ubyte),
        ("rdma_capable", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
    )


class _AccessDesc(ctypes.Structure):
    _fields_ = (("location", _Location), ("flags", ctypes.c_uint32))


class HipDriver:
    """One device over `library` (the loaded HIP runtime, or a scripted stand-in with the same functions)."""

    def __init__(self, device_index: int, library: Any) -> None:
        self._library = library
        self._index = device_index
        location = _Location(_ON_DEVICE, device_index)
        self._allocation = _AllocationProp(type=_PINNED, location=location)
        self._access = _AccessDesc(location, _READ_WRITE)

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name, None)
        if function is None:
            raise DeviceError(f"This HIP runtime has no {name}.")
        code = int(function(*arguments))
        if code == _OUT_OF_MEMORY:
            raise OutOfDeviceMemory(f"The HIP runtime has no memory for {name}.")
        if code in _LOST:
            raise DeviceLost(f"The device failed and this process can no longer use it: {name} says {code}.")
        if code:
            raise DeviceError(f"The HIP runtime refused {name}: error {code}.")

    def version(self) -> tuple[int, int]:
        """Of the runtime, which carries ROCm's number: major * 10,000,000 + minor * 100,000 + patch, so 71260850 is 7.12."""
        number = ctypes.c_int()
        self._call("hipRuntimeGetVersion", ctypes.byref(number))
        return number.value // 10_000_000, number.value // 100_000 % 100

    def bus_id(self) -> str:
        """Domain, bus, device and function, as the management library writes them: 0000:03:00.0."""
        text = ctypes.create_string_buffer(64)
        self._call("hipDeviceGetPCIBusId", text, ctypes.c_int(len(text)), ctypes.c_int(self._index))
        return text.value.decode("ascii", errors="replace").lower()

    def why_no_virtual_memory(self) -> str:
        """Why virtual memory must not be used here; "" where it may be. Maps two units for a moment to find out."""
        try:
            version = self.version()
            if version < LEAST_VIRTUAL_VERSION:
                wanted = ".".join(map(str, LEAST_VIRTUAL_VERSION))
                return f"HIP {version[0]}.{version[1]} maps memory wrongly in places; {wanted} or newer is needed."
            supported = ctypes.c_int()
            kind = ctypes.c_int(_VIRTUAL_MEMORY_SUPPORTED)
            self._call("hipDeviceGetAttribute", ctypes.byref(supported), kind, ctypes.c_int(self._index))
            if not supported.value:
                return "The device has no virtual memory calls."
            self._try_out()
        except DeviceLost:
            raise
        except (DeviceError, OutOfDeviceMemory) as error:
            return str(error)
        return ""

    def _try_out(self) -> None:
        """Two ranges, each with a handle at an offset: what older runtimes refuse."""
        unit_bytes = self.granularity_bytes()
        ranges = [self.reserve(2 * unit_bytes) for _ in range(2)]
        try:
            for address in ranges:
                handle = self.create(unit_bytes)
                try:
                    self.map(address + unit_bytes, unit_bytes, handle)
                    self.unmap(address + unit_bytes, unit_bytes)
                finally:
                    self.release(handle)
        finally:
            for address in ranges:
                self.free_range(address, 2 * unit_bytes)

    # -- virtual memory, as memory.arena needs it

    def granularity_bytes(self) -> int:
        """Handles are whole multiples of this."""
        unit = ctypes.c_size_t()
        allocation = ctypes.byref(self._allocation)
        self._call("hipMemGetAllocationGranularity", ctypes.byref(unit), allocation, ctypes.c_uint32(_MINIMUM))
        if unit.value <= 0:
            raise DeviceError(f"The HIP runtime names a granularity of {unit.value} bytes.")
        return unit.value

    def reserve(self, num_bytes: int) -> int:
        """An address range without memory."""
        address = ctypes.c_void_p()
        none, size = ctypes.c_void_p(), ctypes.c_size_t(num_bytes)
        self._call("hipMemAddressReserve", ctypes.byref(address), size, ctypes.c_size_t(0), none, ctypes.c_ulonglong(0))
        return address.value or 0

    def free_range(self, address: int, num_bytes: int) -> None:
        """Give the addresses back."""
        self._call("hipMemAddressFree", ctypes.c_void_p(address), ctypes.c_size_t(num_bytes))

    def create(self, num_bytes: int) -> Any:
        """Memory without an address. Raises OutOfDeviceMemory."""
        handle = ctypes.c_void_p()
        allocation, size = ctypes.byref(self._allocation), ctypes.c_size_t(num_bytes)
        try:
            self._call("hipMemCreate", ctypes.byref(handle), size, allocation, ctypes.c_ulonglong(0))
        except OutOfDeviceMemory as error:
            raise OutOfDeviceMemory(
                f"{format_bytes(num_bytes)} of KV cache are not to be had on the device; lower --memory, or end other processes."
            ) from error
        return handle

    def release(self, handle: Any) -> None:
        """Give created memory back; it goes once it is unmapped too."""
        self._call("hipMemRelease", handle)

    def map(self, address: int, num_bytes: int, handle: Any) -> None:
        """Back the addresses with the whole of a handle, readable and writable. The offset into a handle is always 0."""
        where, size = ctypes.c_void_p(address), ctypes.c_size_t(num_bytes)
        self._call("hipMemMap", where, size, ctypes.c_size_t(0), handle, ctypes.c_ulonglong(0))
        try:
            self._call("hipMemSetAccess", where, size, ctypes.byref(self._access), ctypes.c_size_t(1))
        except BaseException:
            self._call("hipMemUnmap", where, size)
            raise

    def unmap(self, address: int, num_bytes: int) -> None:
        """Take the memory of one whole handle from its addresses."""
        self._call("hipMemUnmap", ctypes.c_void_p(address), ctypes.c_size_t(num_bytes))

    def synchronize(self) -> None:
        """Wait for all work of this thread's device: what is unmapped must not be in use."""
        self._call("hipSetDevice", ctypes.c_int(self._index))
        self._call("hipDeviceSynchronize")


def is_device_present(root: Path = Path("/")) -> bool:
    """Whether the kernel offers compute devices of this kind: known without torch. WSL has a node of its own."""
    return os.name != "posix" or any((root / node).exists() for node in ("dev/kfd", "dev/dxg"))


def loaded_runtime(root: Path = Path("/")) -> Any | None:
    """The HIP runtime that torch has loaded into this process; None where there is none."""
    found = ProcFiles(root).loaded_library("libamdhip64")
    for name in (*([found] if found else []), *_NAMES):
        try:
            return ctypes.CDLL(name, mode=getattr(os, "RTLD_NOLOAD", 0) | getattr(os, "RTLD_NOW", 0))
        except OSError:
            continue
    return None
