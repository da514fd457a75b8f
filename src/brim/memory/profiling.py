"""What each phase of a start took: duration, bytes before and after, peak. Owns the record and its attribution. Torch-free.

A phase says which bytes it can compute (weights, buffers); the rest of what it measured goes to the category it names,
and a neighbour's change goes to the neighbour. Nothing is left without an owner.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from brim.memory.ledger import Category, LedgerLine
from brim.memory.snapshot import Change, Snapshot
from brim.platforms.base import Platform


@dataclass(frozen=True, slots=True)
class PhaseRecord:
    """One phase. lines: what it added to the ledger. peak_ours_bytes: the most held at any moment of it."""

    name: str
    seconds: float
    before: Snapshot
    after: Snapshot
    peak_ours_bytes: int
    lines: tuple[LedgerLine, ...] = ()

    @property
    def change(self) -> Change:
        """After less before."""
        return Change.between(self.before, self.after)

    @property
    def transient_bytes(self) -> int:
        """What the phase held for a while and gave back."""
        return max(0, self.peak_ours_bytes - max(self.before.reading.ours_bytes, self.after.reading.ours_bytes))


def attribute(change: Change, computed: Sequence[LedgerLine], category: Category, owner: str) -> tuple[LedgerLine, ...]:
    """The phase's lines: those computed, and the rest of the measured change as one line of `category`.

    A negative rest (memory given back, or computed bytes not resident yet) is written as it is, so that the sum of the lines
    stays what was measured. By readings that are not trusted the rest is no more than predicted.
    Example: 540 MiB measured, 512 MiB of weights computed: the line `category` holds 28 MiB, measured.
    """
    rest_bytes = change.ours_bytes - sum(line.num_bytes for line in computed)
    if not rest_bytes:
        return tuple(computed)
    return (*computed, LedgerLine(category, owner, rest_bytes, "measured" if change.trusted else "predicted"))


def settle_rests(lines: Sequence[LedgerLine]) -> tuple[LedgerLine, ...]:
    """The same sum without negative rests, as far as that goes: what a phase gave back, or found lying ready, an earlier phase
    took, and the latest rests before it are lowered by that much.

    Example: loading took a segment with 17 MiB to spare, and a buffer of 1 MiB was put there: loading grew by 16.
    """
    settled: list[LedgerLine] = []
    for line in lines:
        owed_bytes = -line.num_bytes if line.known_by != "computed" else 0
        if owed_bytes <= 0:
            settled.append(line)
            continue
        for index in reversed(range(len(settled))):
            earlier = settled[index]
            if earlier.known_by != "computed" and earlier.num_bytes > 0 and owed_bytes:
                taken_bytes = min(owed_bytes, earlier.num_bytes)
                settled[index] = replace(earlier, num_bytes=earlier.num_bytes - taken_bytes)
                owed_bytes -= taken_bytes
        settled.append(replace(line, num_bytes=-owed_bytes))
    return tuple(line for line in settled if line.num_bytes)


@dataclass(slots=True)
class PhaseScope:
    """Handed to the body of a phase: it adds computed lines and names where the rest goes."""

    computed: list[LedgerLine] = field(default_factory=list)
    rest_category: Category = "unattributed"
    rest_owner: str = ""
    record: PhaseRecord | None = None

    def add(self, category: Category, owner: str, num_bytes: int) -> None:
        """A line whose bytes are known by arithmetic."""
        self.computed.append(LedgerLine(category, owner, num_bytes, "computed"))


class Profiler:
    """Measures phases one after the other on one platform."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self.records: list[PhaseRecord] = []

    @contextmanager
    def phase(self, name: str, rest: Category = "unattributed", owner: str = "") -> Iterator[PhaseScope]:
        """Measure the body; its record is complete, and in `records`, when the body ends without an error."""
        scope = PhaseScope(rest_category=rest, rest_owner=owner or name)
        self._platform.reset_peak()
        before = Snapshot.take(self._platform)
        yield scope
        self._platform.synchronize()
        peak_bytes = self._platform.peak_ours_bytes()
        after = Snapshot.take(self._platform)
        lines = attribute(Change.between(before, after), scope.computed, scope.rest_category, scope.rest_owner)
        scope.record = PhaseRecord(name, after.seconds - before.seconds, before, after, peak_bytes, lines)
        self.records.append(scope.record)

    @property
    def lines(self) -> tuple[LedgerLine, ...]:
        """The lines of all phases in order, rests settled."""
        return settle_rests([line for record in self.records for line in record.lines])

    @property
    def peak_ours_bytes(self) -> int:
        """The most held in any phase."""
        return max((record.peak_ours_bytes for record in self.records), default=0)
