"""A reading with its moment. Owns the difference of two: what we took, what neighbours did. Torch-free."""

from __future__ import annotations

import time
from dataclasses import dataclass

from brim.platforms.base import MemoryReading, Platform


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The device at `seconds` on the monotonic clock. accounted_bytes: what our own arenas held by their own account."""

    seconds: float
    reading: MemoryReading
    accounted_bytes: int = 0

    @staticmethod
    def take(platform: Platform) -> Snapshot:
        """After queued work is done, so that its memory is in the reading."""
        platform.synchronize()
        return Snapshot(time.monotonic(), platform.reading(), platform.arena_bytes)


@dataclass(frozen=True, slots=True)
class Change:
    """What happened between two snapshots. neighbours_bytes is theirs and is never charged to us."""

    seconds: float
    ours_bytes: int
    neighbours_bytes: int
    free_bytes: int
    trusted: bool

    @staticmethod
    def between(before: Snapshot, after: Snapshot) -> Change:
        """After less before."""
        return Change(
            seconds=after.seconds - before.seconds,
            ours_bytes=after.reading.ours_bytes - before.reading.ours_bytes,
            neighbours_bytes=after.reading.others_bytes - before.reading.others_bytes,
            free_bytes=after.reading.free_bytes - before.reading.free_bytes,
            trusted=before.reading.trusted and after.reading.trusted,
        )
