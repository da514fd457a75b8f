"""The virtual memory calls of a scripted device, as an arena uses them. Owns addresses, handles and what is mapped where.

It is strict where some driver is: sizes and places must be multiples of the granularity, a handle is mapped and unmapped whole,
at an address inside a reserved range, and nothing is mapped twice.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from brim.errors import DeviceError, OutOfDeviceMemory
from brim.platforms.scripted_device import ARENA, ScriptedDevice
from brim.units import format_bytes

_FIRST_ADDRESS = 1 << 44


@dataclass(frozen=True, slots=True)
class ScriptedHandle:
    """Memory that is not at any address yet."""

    number: int
    num_bytes: int


class ScriptedMemory:
    """See memory.arena.virtual_arena.VirtualMemory."""

    def __init__(self, device: ScriptedDevice) -> None:
        self._device = device
        self._numbers = itertools.count()
        self._next_address = _FIRST_ADDRESS
        self._ranges: dict[int, int] = {}
        self._held: dict[int, int] = {}
        self._mapped: dict[int, ScriptedHandle] = {}
        self._at_an_address: set[int] = set()

    def reserve(self, num_bytes: int) -> int:
        """An address range; takes no memory."""
        self._aligned("reserve", num_bytes)
        address, self._next_address = self._next_address, self._next_address + 2 * num_bytes
        self._ranges[address] = num_bytes
        return address

    def free_range(self, address: int, num_bytes: int) -> None:
        """The range goes; nothing may be mapped there."""
        if self._ranges.pop(address, None) != num_bytes:
            raise DeviceError(f"The scripted driver knows no range of {num_bytes} bytes there.")
        if any(address <= place < address + num_bytes for place in self._mapped):
            raise DeviceError("The scripted driver still has memory mapped in that range.")

    def create(self, num_bytes: int) -> ScriptedHandle:
        """Memory of the device. Raises OutOfDeviceMemory, DeviceLost."""
        self._aligned("create", num_bytes)
        if self._device.phase == "commit":
            self._device.enter("committing")
        self._device.check("create", num_bytes)
        largest_bytes = self._device.script.largest_handle_bytes
        if largest_bytes and num_bytes > largest_bytes:
            raise OutOfDeviceMemory(f"The scripted driver has no handle of {format_bytes(num_bytes)}.")
        self._device.take(ARENA, num_bytes)
        handle = ScriptedHandle(next(self._numbers), num_bytes)
        self._held[handle.number] = num_bytes
        return handle

    def release(self, handle: ScriptedHandle) -> None:
        """The memory goes back."""
        if handle.number in self._at_an_address:
            raise DeviceError("The scripted driver still has that handle mapped.")
        self._device.take(ARENA, -self._held.pop(handle.number))

    def map(self, address: int, num_bytes: int, handle: ScriptedHandle) -> None:
        """Back [address, address + num_bytes) with the whole handle."""
        self._device.check("map", num_bytes)
        self._aligned("map", num_bytes)
        inside = any(start <= address and address + num_bytes <= start + size for start, size in self._ranges.items())
        free = all(place + mapped.num_bytes <= address or place >= address + num_bytes for place, mapped in self._mapped.items())
        if num_bytes != handle.num_bytes or not inside or not free:
            raise DeviceError("The scripted driver maps whole handles, inside a range, where nothing is.")
        self._mapped[address] = handle
        self._at_an_address.add(handle.number)

    def unmap(self, address: int, num_bytes: int) -> None:
        """The addresses stay, the memory behind them is the handle's again."""
        handle = self._mapped.get(address)
        if handle is None or handle.num_bytes != num_bytes:
            raise DeviceError("The scripted driver unmaps whole handles.")
        del self._mapped[address]
        self._at_an_address.discard(handle.number)

    def synchronize(self) -> None:
        """Nothing is queued."""

    def _aligned(self, call: str, num_bytes: int) -> None:
        if num_bytes <= 0 or num_bytes % self._device.script.granularity_bytes:
            raise DeviceError(f"The scripted driver refuses to {call} {num_bytes} bytes: no multiple of its granularity.")
