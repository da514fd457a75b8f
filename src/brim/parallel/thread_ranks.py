"""Ranks that are threads of one process: for scripted devices and tests. Owns the meeting point; nothing travels.

An exchange ends when every rank has spoken in it or left, so that what each rank learns does not depend on who is faster.
"""

from __future__ import annotations

from threading import Condition

from brim.errors import RankFailed
from brim.parallel.ranks import Ranks, said, silent


class ThreadMeeting:
    """Where `size` threads meet, round by round. timeout_s: how long the others are waited for."""

    def __init__(self, size: int, timeout_s: float = 30.0) -> None:
        self._changed = Condition()
        self._rounds: list[dict[int, bytes]] = []
        self._left: dict[int, str] = {}
        self._timeout_s = timeout_s
        self.ranks = tuple(ThreadRanks(self, index, size) for index in range(size))

    def meet(self, index: int, number: int, word: bytes) -> list[bytes]:
        """All words of a round, once all are there. Raises RankFailed where somebody left before, or takes too long."""
        everybody = range(len(self.ranks))
        with self._changed:
            while len(self._rounds) <= number:
                self._rounds.append({})
            words = self._rounds[number]
            words[index] = word
            self._changed.notify_all()
            in_time = self._changed.wait_for(lambda: all(r in words or r in self._left for r in everybody), self._timeout_s)
            missing = [rank for rank in everybody if rank not in words]
            if not missing:
                return [words[rank] for rank in everybody]
            why = said(self._left.get(rank, "") for rank in missing)
        raise RankFailed(why or silent(missing, None if in_time else self._timeout_s))

    def leave(self, index: int, why: str) -> None:
        """Whoever waits for this rank, now or later, learns that it left."""
        with self._changed:
            self._left.setdefault(index, why)
            self._changed.notify_all()


class ThreadRanks(Ranks):
    """One thread's end."""

    def __init__(self, meeting: ThreadMeeting, index: int, size: int) -> None:
        self.index, self.size = index, size
        self._meeting = meeting
        self._num_exchanges = 0

    def _exchange(self, word: bytes) -> list[bytes]:
        self._num_exchanges += 1
        return self._meeting.meet(self.index, self._num_exchanges - 1, word)

    def _leave(self, why: str) -> None:
        self._meeting.leave(self.index, why)
