"""The few calls of Level Zero that torch does not offer: virtual memory, and how much memory is usable. Owns their errors.

Memory mapped in one context is no memory in another, so virtual memory needs the context that torch's queues live in (see
sycl_context). Without it there are only readings.
Written against the documentation; never run on the hardware.
Source: Level Zero specification, "Virtual Memory" (zeVirtualMemReserve, zePhysicalMemCreate, zeVirtualMemMap) and extension
ZE_extension_device_usablemem_size_properties; ze_api.h for the layout of the structures.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from brim.errors import DeviceError, DeviceLost, OutOfDeviceMemory
from brim.units import MIB, format_bytes

_DEVICE_LOST, _OUT_OF_HOST_MEMORY, _OUT_OF_DEVICE_MEMORY = 0x70000001, 0x70000002, 0x70000003
_DEVICE_PROPERTIES, _PHYSICAL_MEM_DESC, _USABLE_MEM_SIZE = 0x3, 0x20, 0x00020041
_READ_WRITE = 1
_COMMON_HANDLE_BYTES = 256 * MIB  # page sizes grow with what is mapped: asked for what an arena maps at once
_MOST_DRIVERS = 16


class _DeviceProperties(ctypes.Structure):
    _fields_ = (
        ("stype", ctypes.c_uint32), ("next", ctypes.c_void_p), ("type", ctypes.c_uint32), ("vendor_id", ctypes.c_uint32),
        ("device_id", ctypes.c_uint32), ("flags", ctypes.c_uint32), ("subdevice_id", ctypes.c_uint32),
        ("core_clock_rate", ctypes.c_uint32), ("max_alloc_size", ctypes.c_uint64), ("max_contexts", ctypes.c_uint32),
        ("max_priority", ctypes.c_uint32), ("threads_per_eu", ctypes.c_uint32), ("simd_width", ctypes.c_uint32),
        ("eus_per_subslice", ctypes.c_uint32), ("subslices_per_slice", ctypes.c_uint32), ("slices", ctypes.c_uint32),
        ("timer_resolution", ctypes.c_uint64), ("timestamp_bits", ctypes.c_uint32), ("kernel_bits", ctypes.c_uint32),
        ("uuid", ctypes.c_ubyte * 16), ("name", ctypes.c_char * 256),
    )  # fmt: skip


class _UsableMemory(ctypes.Structure):
    _fields_ = (("stype", ctypes.c_uint32), ("next", ctypes.c_void_p), ("num_bytes", ctypes.c_uint64))


class _PhysicalMemDesc(ctypes.Structure):
    _fields_ = (
        ("stype", ctypes.c_uint32),
        ("next", ctypes.c_void_p),
        ("flags", ctypes.c_uint32),
        ("size", ctypes.c_size_t),
    )


class LevelZero:
    """One device, by its UUID as torch names it. `library` is the loaded Level Zero loader, or a scripted stand-in.

    context: the native context of torch's queues; None: not known (why_no_context), readings only. wait: returns when the device
    is idle.
    Raises DeviceError where there is no such device.
    """

    def __init__(
        self, uuid: str, library: Any, *, context: int | None = None, why_no_context: str = "", wait: Callable[[], None]
    ) -> None:
        self._library = library
        self._why_no_context = why_no_context
        self._context = ctypes.c_void_p(context) if context else None
        self._wait = wait
        self._device = self._find(uuid.replace("-", "").lower())

    def _call(self, name: str, *arguments: Any) -> None:
        _call(self._library, name, *arguments)

    def _find(self, uuid: str) -> ctypes.c_void_p:
        for device, properties in _devices(self._library):
            if bytes(properties.uuid).hex() == uuid:
                return device
        raise DeviceError("Level Zero does not list the device that torch uses.")

    def usable_bytes(self) -> int | None:
        """Memory that could be allocated now; None where the driver does not say."""
        usable = _UsableMemory(stype=_USABLE_MEM_SIZE)
        properties = _DeviceProperties(stype=_DEVICE_PROPERTIES, next=ctypes.addressof(usable))
        try:
            self._call("zeDeviceGetProperties", self._device, ctypes.byref(properties))
        except DeviceLost:
            raise
        except (DeviceError, OutOfDeviceMemory):
            return None
        return usable.num_bytes or None  # a driver without the extension leaves it 0

    def why_no_virtual_memory(self) -> str:
        """Why virtual memory must not be used here; "" where it may be. Maps one page for a moment; no kernel touches it."""
        if self._context is None:
            return f"The context of torch's queues is not known: {self._why_no_context or 'nobody asked for it'}."
        try:
            unit_bytes = self.granularity_bytes()
            address = self.reserve(unit_bytes)
            try:
                handle = self.create(unit_bytes)
                try:
                    self.map(address, unit_bytes, handle)
                    self.unmap(address, unit_bytes)
                finally:
                    self.release(handle)
            finally:
                self.free_range(address, unit_bytes)
        except DeviceLost:
            raise
        except (DeviceError, OutOfDeviceMemory) as error:
            return str(error)
        return ""

    # -- virtual memory, as memory.arena needs it

    def granularity_bytes(self) -> int:
        """Handles are whole multiples of this."""
        unit = ctypes.c_size_t()
        size = ctypes.c_size_t(_COMMON_HANDLE_BYTES)
        self._call("zeVirtualMemQueryPageSize", self._context, self._device, size, ctypes.byref(unit))
        if unit.value <= 0:
            raise DeviceError(f"The driver names a page size of {unit.value} bytes.")
        return unit.value

    def reserve(self, num_bytes: int) -> int:
        """An address range without memory."""
        address, none = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("zeVirtualMemReserve", self._context, none, ctypes.c_size_t(num_bytes), ctypes.byref(address))
        return address.value or 0

    def free_range(self, address: int, num_bytes: int) -> None:
        """Give the addresses back."""
        self._call("zeVirtualMemFree", self._context, ctypes.c_void_p(address), ctypes.c_size_t(num_bytes))

    def create(self, num_bytes: int) -> Any:
        """Memory without an address. Raises OutOfDeviceMemory."""
        handle = ctypes.c_void_p()
        wanted = _PhysicalMemDesc(stype=_PHYSICAL_MEM_DESC, size=num_bytes)
        try:
            self._call("zePhysicalMemCreate", self._context, self._device, ctypes.byref(wanted), ctypes.byref(handle))
        except OutOfDeviceMemory as error:
            raise OutOfDeviceMemory(
                f"{format_bytes(num_bytes)} of KV cache are not to be had on the device; lower --memory, or end other processes."
            ) from error
        return handle

    def release(self, handle: Any) -> None:
        """Give created memory back."""
        self._call("zePhysicalMemDestroy", self._context, handle)

    def map(self, address: int, num_bytes: int, handle: Any) -> None:
        """Back the addresses with the whole of a handle, readable and writable."""
        where, size, access = ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), ctypes.c_uint32(_READ_WRITE)
        self._call("zeVirtualMemMap", self._context, where, size, handle, ctypes.c_size_t(0), access)

    def unmap(self, address: int, num_bytes: int) -> None:
        """Take the memory of one whole handle from its addresses."""
        self._call("zeVirtualMemUnmap", self._context, ctypes.c_void_p(address), ctypes.c_size_t(num_bytes))

    def synchronize(self) -> None:
        """Wait for all work: what is unmapped must not be in use."""
        self._wait()


def is_device_present(root: Path = Path("/")) -> bool:
    """Whether the kernel offers graphics devices at all: known without torch. WSL has a node of its own."""
    return os.name != "posix" or any((root / "dev/dri").glob("renderD*")) or (root / "dev/dxg").exists()


def loaded_loader() -> Any | None:
    """The Level Zero loader that torch's runtime has loaded into this process; None where there is none."""
    for name in ("libze_loader.so.1", "ze_loader.dll"):
        try:
            return ctypes.CDLL(name, mode=getattr(os, "RTLD_NOLOAD", 0) | getattr(os, "RTLD_NOW", 0))
        except OSError:
            continue
    return None


def list_cards(library: Any) -> list[tuple[str, LevelZero]]:
    """Every device that the loader lists, by the product's name, for readings only; none where it does not answer."""
    try:
        found = [(bytes(p.uuid).hex(), p.name.decode(errors="replace")) for _, p in _devices(library)]
        return [(name, LevelZero(uuid, library, wait=lambda: None)) for uuid, name in found]
    except (DeviceError, DeviceLost, OutOfDeviceMemory):
        return []


def _call(library: Any, name: str, *arguments: Any) -> None:
    """Raises OutOfDeviceMemory, DeviceLost, DeviceError."""
    function = getattr(library, name, None)
    if function is None:
        raise DeviceError(f"This Level Zero loader has no {name}.")
    code = int(function(*arguments)) & 0xFFFFFFFF
    if code in (_OUT_OF_DEVICE_MEMORY, _OUT_OF_HOST_MEMORY):
        raise OutOfDeviceMemory(f"The driver has no memory for {name}.")
    if code == _DEVICE_LOST:
        raise DeviceLost(f"The device failed and this process can no longer use it: {name} lost it.")
    if code:
        raise DeviceError(f"The driver refused {name}: error 0x{code:x}.")


def _list(library: Any, name: str, *owner: Any) -> list[ctypes.c_void_p]:
    count = ctypes.c_uint32(0)
    _call(library, name, *owner, ctypes.byref(count), None)
    count.value = min(count.value, _MOST_DRIVERS)
    handles = (ctypes.c_void_p * max(1, count.value))()
    _call(library, name, *owner, ctypes.byref(count), handles)
    return [ctypes.c_void_p(handle) for handle in handles[: count.value] if handle]


def _devices(library: Any) -> Iterator[tuple[ctypes.c_void_p, _DeviceProperties]]:
    """Of all drivers, in the loader's order."""
    _call(library, "zeInit", ctypes.c_uint32(0))
    for driver in _list(library, "zeDriverGet"):
        for device in _list(library, "zeDeviceGet", driver):
            properties = _DeviceProperties(stype=_DEVICE_PROPERTIES)
            _call(library, "zeDeviceGetProperties", device, ctypes.byref(properties))
            yield device, properties
