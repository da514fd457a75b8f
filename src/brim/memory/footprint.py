"""What a start takes apart from KV, before any weight is read. Owns `Footprint`. Torch-free.

`worker.startup.plan_start` builds the Footprint from the arithmetic of the very objects that a start makes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from brim.memory.ledger import KnownBy, LedgerLine
from brim.memory.step_memory import StepLimits

LinesFor = Callable[[StepLimits], Sequence[LedgerLine]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Ledger lines that do not depend on the limits, and a function for those that do (tables, buffers, workspace).

    load_transient_bytes: the most that loading holds beyond the weights, given back before KV is committed; it happens
    at another time than steps, so it is compared with the cap on its own and never added to the workspace.
    The function must be monotone: larger limits never take fewer bytes.
    """

    fixed: tuple[LedgerLine, ...]
    lines_for: LinesFor
    load_transient_bytes: int = 0

    def lines(self, limits: StepLimits) -> tuple[LedgerLine, ...]:
        """Every line but KV."""
        return (*self.fixed, *self.lines_for(limits))

    def held_bytes(self, limits: StepLimits) -> int:
        """Their sum."""
        return sum(line.num_bytes for line in self.lines(limits))

    @property
    def fixed_floor_bytes(self) -> int:
        """What no setting makes smaller."""
        return sum(line.num_bytes for line in self.fixed)

    @property
    def load_peak_bytes(self) -> int:
        """The most held while weights are read."""
        return self.fixed_floor_bytes + self.load_transient_bytes


def fixed_lines(
    *, context_bytes: int, weight_bytes: int, context_known_by: KnownBy = "measured", library_bytes: int = 0
) -> tuple[LedgerLine, ...]:
    """The lines that no limit changes. library_bytes: what kernels and thread pools take when first used."""
    lines = [
        LedgerLine("context", "runtime and libraries", context_bytes, context_known_by),
        LedgerLine("weights", "model", weight_bytes, "computed"),
    ]
    if library_bytes:
        lines.append(LedgerLine("activations", "kernel libraries", library_bytes, "predicted"))
    return tuple(lines)
