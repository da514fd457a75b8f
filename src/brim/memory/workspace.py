"""The static step workspace: where every temporary of a step lives. Owns planning by liveness; torch-free.

A step's temporaries are declared with the stages between which they live; buffers that never live at the same time share
bytes. The plan is computed once for the largest step the scheduler may form; every step uses prefixes of its buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from brim.units import round_up

ALIGNMENT_BYTES = 256


@dataclass(frozen=True, slots=True)
class BufferSpec:
    """A temporary of num_bytes, alive from stage first_use to stage last_use, both included."""

    name: str
    num_bytes: int
    first_use: int
    last_use: int


@dataclass(frozen=True, slots=True)
class WorkspacePlan:
    """offsets_bytes[name] into one range of num_bytes."""

    offsets_bytes: dict[str, int]
    num_bytes: int


def plan_workspace(buffers: Sequence[BufferSpec]) -> WorkspacePlan:
    """Offsets such that buffers alive together never overlap: largest first, each at the lowest offset that is free.

    Example: a (100 B, stages 0-1), b (50 B, 1-2), c (100 B, 2-3) at alignment 256: a and c share offset 0, b is at 256.
    """
    placed: list[tuple[int, int, BufferSpec]] = []
    offsets_bytes: dict[str, int] = {}
    for spec in sorted(buffers, key=lambda b: (-b.num_bytes, b.name)):
        overlapping = sorted(
            (start, end) for start, end, other in placed if other.first_use <= spec.last_use and spec.first_use <= other.last_use
        )
        offset = 0
        for start, end in overlapping:
            if offset + spec.num_bytes <= start:
                break
            offset = max(offset, round_up(end, ALIGNMENT_BYTES))
        offsets_bytes[spec.name] = offset
        placed.append((offset, offset + spec.num_bytes, spec))
    total = max((end for _, end, _ in placed), default=0)
    return WorkspacePlan(offsets_bytes, round_up(total, ALIGNMENT_BYTES))
