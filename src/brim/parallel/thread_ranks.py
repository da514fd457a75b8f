"""Ranks that are threads of one process: for scripted devices and tests. Owns the meeting point; nothing travels."""

from __future__ import annotations

from threading import Condition

from brim.errors import RankFailed
from brim.parallel.ranks import Ranks


class ThreadMeeting:
    """Where `size` threads meet, round by round. timeout_s: how long the others are waited for."""

    def __init__(self, size: int, timeout_s: float = 30.0) -> None:
        self._changed = Condition()
        self._rounds: list[dict[int, bytes]] = [{}]
        self._left: set[int] = set()
        self._timeout_s = timeout_s
        self.ranks = tuple(ThreadRanks(self, index, size) for index in range(size))

    def meet(self, index: int, number: int, word: bytes) -> list[bytes]:
        """All words of a round, once all are there. Raises RankFailed where somebody left before, or takes too long."""
        size = len(self.ranks)
        with self._changed:
            while len(self._rounds) <= number:
                self._rounds.append({})
            words = self._rounds[number]
            words[index] = word
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(words) == size or self._left - words.keys(), self._timeout_s)
            if len(words) == size:
                return [words[rank] for rank in range(size)]
            missing = ", ".join(str(rank) for rank in range(size) if rank not in words)
        raise RankFailed(f"Rank {missing} is gone, or did not answer within {self._timeout_s:g} s; rank {index} cannot go on.")

    def leave(self, index: int) -> None:
        """Whoever waits for this rank, now or later, learns that it is gone."""
        with self._changed:
            self._left.add(index)
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

    def close(self) -> None:
        """See Ranks."""
        self._meeting.leave(self.index)
