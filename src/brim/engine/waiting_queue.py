"""Sequences that wait for a row and blocks, new and preempted. Owns their order: priority, then arrival."""

from __future__ import annotations

import heapq

from brim.engine.sequence import Sequence, SequenceStatus

_WAITING = (SequenceStatus.WAITING, SequenceStatus.PREEMPTED)


class WaitingQueue:
    """A heap by `Sequence.order`; a preempted sequence comes back to its old place. Finished ones are dropped when met."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Sequence]] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, sequence: Sequence) -> None:
        """Add a waiting or preempted sequence; orders are unique."""
        heapq.heappush(self._heap, (sequence.order, sequence))
        self._count += 1

    def first(self) -> Sequence | None:
        """The next to be admitted; it stays."""
        while self._heap and self._heap[0][1].status not in _WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Sequence:
        """Take the one that `first` returned."""
        self._count -= 1
        return heapq.heappop(self._heap)[1]

    def note_finished(self) -> None:
        """A sequence in the queue has finished; it is dropped when it comes to the front."""
        self._count -= 1
