"""The few calls of the CUDA driver that torch does not offer: virtual memory, and device attributes. Owns their errors.

Source: CUDA driver API reference, "Virtual Memory Management" (cuMemAddressReserve, cuMemCreate, cuMemMap, cuMemSetAccess).
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import ExitStack
from typing import Any

from brim.errors import DeviceError, DeviceLost, OutOfDeviceMemory
from brim.units import format_bytes

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
# After these the context is dead: uncorrectable memory or link, illegal address, launch timeout, assert, failed kernels
_LOST = frozenset({214, 220, 700, 702, 710, 714, 715, 716, 717, 718, 719})


def is_driver_installed() -> bool:
    """Whether the driver's library can be loaded: milliseconds, no context, and no framework imported to find out."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


class CudaDriver:
    """Virtual memory of one device over `bindings` (cuda.bindings.driver, or a scripted stand-in)."""

    def __init__(self, device_index: int, bindings: Any) -> None:
        self._bindings = bindings
        self._index = device_index
        self._call("cuInit", 0)
        self._allocation = bindings.CUmemAllocationProp()
        self._allocation.type = bindings.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._allocation.location.type = bindings.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._allocation.location.id = device_index
        self._access = bindings.CUmemAccessDesc()
        self._access.location = self._allocation.location
        self._access.flags = bindings.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *results = getattr(self._bindings, name)(*arguments)
        if int(code) == _OUT_OF_MEMORY:
            raise OutOfDeviceMemory(f"The driver has no memory for {name}.")
        if int(code) in _LOST:
            raise DeviceLost(f"The device failed and this process can no longer use it: {name} says {code}.")
        if int(code):
            raise DeviceError(f"The driver refused {name}: {code}.")
        return results[0] if len(results) == 1 else None if not results else tuple(results)

    def attribute(self, name: str) -> int:
        """A device attribute by the driver's own name (CU_DEVICE_ATTRIBUTE_...)."""
        key = getattr(self._bindings.CUdevice_attribute, name)
        return int(self._call("cuDeviceGetAttribute", key, self._call("cuDeviceGet", self._index)))

    def has_context(self) -> bool:
        """Whether this process already uses the device; asking creates nothing."""
        _, is_active = self._call("cuDevicePrimaryCtxGetState", self._call("cuDeviceGet", self._index))
        return bool(is_active)

    def granularity_bytes(self) -> int:
        """Handles are whole multiples of this."""
        flag = self._bindings.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return int(self._call("cuMemGetAllocationGranularity", self._allocation, flag))

    def why_no_virtual_memory(self) -> str:
        """Why virtual memory must not be used here; "" where it may be. Maps one unit for a moment to find out: virtual GPUs and
        sandboxes have drivers that claim these calls and refuse them. A device that is full refuses nothing for good.

        Raises DeviceLost.
        """
        try:
            if not self.attribute("CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED"):
                return "The device has no virtual memory calls."
            self._try_out(self.granularity_bytes())
        except DeviceLost:
            raise
        except DeviceError as error:
            return str(error)
        except OutOfDeviceMemory:
            return ""
        return ""

    def _try_out(self, num_bytes: int) -> None:
        """Reserve, create, map and give back."""
        with ExitStack() as undo:
            address = self.reserve(num_bytes)
            undo.callback(self.free_range, address, num_bytes)
            handle = self.create(num_bytes)
            undo.callback(self.release, handle)
            self.map(address, num_bytes, handle)
            undo.callback(self.unmap, address, num_bytes)

    def reserve(self, num_bytes: int) -> int:
        """An address range without memory."""
        return int(self._call("cuMemAddressReserve", num_bytes, 0, 0, 0))

    def free_range(self, address: int, num_bytes: int) -> None:
        """Give the addresses back."""
        self._call("cuMemAddressFree", address, num_bytes)

    def create(self, num_bytes: int) -> Any:
        """Memory without an address. Raises OutOfDeviceMemory."""
        try:
            return self._call("cuMemCreate", num_bytes, self._allocation, 0)
        except OutOfDeviceMemory as error:
            raise OutOfDeviceMemory(
                f"{format_bytes(num_bytes)} of KV cache are not to be had on the device; lower --memory, or end other processes."
            ) from error

    def release(self, handle: Any) -> None:
        """Give created memory back; it goes once it is unmapped too."""
        self._call("cuMemRelease", handle)

    def map(self, address: int, num_bytes: int, handle: Any) -> None:
        """Back the addresses with the whole of a handle, readable and writable."""
        self._call("cuMemMap", address, num_bytes, 0, handle, 0)
        try:
            self._call("cuMemSetAccess", address, num_bytes, [self._access], 1)
        except BaseException:
            self._call("cuMemUnmap", address, num_bytes)
            raise

    def unmap(self, address: int, num_bytes: int) -> None:
        """Take the memory of one whole handle from its addresses."""
        self._call("cuMemUnmap", address, num_bytes)

    def synchronize(self) -> None:
        """Wait for all work of the context: what is unmapped must not be in use. On any thread."""
        if int(self._call("cuCtxGetCurrent")) == 0:  # a thread that has not used the device yet
            device = self._call("cuDeviceGet", self._index)
            self._call("cuCtxSetCurrent", self._call("cuDevicePrimaryCtxRetain", device))
            self._call("cuDevicePrimaryCtxRelease", device)  # the framework keeps it alive
        self._call("cuCtxSynchronize")
