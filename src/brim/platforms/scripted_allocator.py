"""The framework's allocator on a scripted device. Owns segments, what is free in them, and the fraction it may hold.

Like torch's: small requests share segments of 2 MiB, those below 10 MiB share segments of 20 MiB, larger ones get segments of
their own; what is given back stays with the process until the cache is emptied, and only segments that are wholly free go then.
Source: "CUDA semantics, memory management" and c10/cuda/CUDACachingAllocator.h.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from brim.errors import OutOfDeviceMemory
from brim.platforms.scripted_device import ALLOCATOR, ScriptedDevice
from brim.units import MIB, format_bytes, round_up

_ROUNDING_BYTES = 512
_SMALL_BYTES, _SMALL_SEGMENT_BYTES = MIB, 2 * MIB
_SHARED_BYTES, _SHARED_SEGMENT_BYTES = 10 * MIB, 20 * MIB


@dataclass(slots=True)
class Segment:
    """free: (start, bytes) of what nobody holds, in order."""

    num_bytes: int
    is_small: bool
    free: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class Block:
    """Memory of the allocator; given back with the last reference to it, as a tensor's is."""

    allocator: ScriptedAllocator
    segment: Segment
    start: int
    num_bytes: int
    is_kv: bool = False
    is_freed: bool = False

    def free(self) -> None:
        """Back to the allocator, once."""
        if not self.is_freed:
            self.is_freed = True
            self.allocator.put_back(self)

    def __del__(self) -> None:
        self.free()


class ScriptedAllocator:
    """fraction_bytes: the most it may hold; None: no limit."""

    def __init__(self, device: ScriptedDevice) -> None:
        self.device = device
        self.fraction_bytes: int | None = None
        self.peak_bytes = 0
        self._segments: list[Segment] = []

    @property
    def reserved_bytes(self) -> int:
        """All segments."""
        return self.device.ours.get(ALLOCATOR, 0)

    def allocate(self, num_bytes: int, *, is_kv: bool = False) -> Block:
        """is_kv: the KV cache, which is not needed beside itself.

        Raises OutOfDeviceMemory where neither the cache nor the device, nor both after the cache was emptied, has it."""
        self.device.check("allocation", num_bytes)
        wanted_bytes = round_up(max(1, num_bytes), _ROUNDING_BYTES)
        block = self._from_cache(wanted_bytes)
        if block is None:
            self._new_segment(wanted_bytes)
            block = self._from_cache(wanted_bytes)
            assert block is not None, "a new segment holds what it was made for"
        block.is_kv = is_kv
        if not is_kv:
            self.device.live_bytes += wanted_bytes
            self.device.note_need()
        return block

    def put_back(self, block: Block) -> None:
        """Into the segment's free list, merged with its neighbours."""
        if not block.is_kv:
            self.device.live_bytes -= block.num_bytes
        merged: list[tuple[int, int]] = []
        for start, num_bytes in sorted([*block.segment.free, (block.start, block.num_bytes)]):
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + num_bytes)
            else:
                merged.append((start, num_bytes))
        block.segment.free = merged

    def empty_cache(self) -> None:
        """Segments that nobody holds a part of go back to the device."""
        for segment in [s for s in self._segments if s.free == [(0, s.num_bytes)]]:
            self._segments.remove(segment)
            self.device.take(ALLOCATOR, -segment.num_bytes)

    def _from_cache(self, num_bytes: int) -> Block | None:
        """The smallest hole that holds it."""
        is_small = num_bytes <= _SMALL_BYTES
        holes = [(hole[1], i, hole[0]) for i, s in enumerate(self._segments) if s.is_small == is_small for hole in s.free]
        fitting = [hole for hole in holes if hole[0] >= num_bytes]
        if not fitting:
            return None
        size, index, start = min(fitting)
        segment = self._segments[index]
        segment.free.remove((start, size))
        if size > num_bytes:
            segment.free.append((start + num_bytes, size - num_bytes))
            segment.free.sort()
        return Block(self, segment, start, num_bytes)

    def _new_segment(self, num_bytes: int) -> None:
        is_small = num_bytes <= _SMALL_BYTES
        size = _SMALL_SEGMENT_BYTES if is_small else _SHARED_SEGMENT_BYTES if num_bytes < _SHARED_BYTES else 0
        size = size or round_up(num_bytes, 2 * MIB)
        if not self._is_allowed(size):
            self.empty_cache()
            if not self._is_allowed(size):
                raise OutOfDeviceMemory(
                    f"The allocator is out of memory: {format_bytes(size)} asked for, {format_bytes(self.reserved_bytes)} held "
                    f"of {format_bytes(self.fraction_bytes or 0)} allowed."
                )
        try:
            self.device.take(ALLOCATOR, size)
        except OutOfDeviceMemory:
            self.empty_cache()
            self.device.take(ALLOCATOR, size)
        self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)
        self._segments.append(Segment(size, is_small, [(0, size)]))

    def _is_allowed(self, num_bytes: int) -> bool:
        return self.fraction_bytes is None or self.reserved_bytes + num_bytes <= self.fraction_bytes
