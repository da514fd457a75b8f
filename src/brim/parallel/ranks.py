"""What several ranks agree on before anything is built from it: always the least. Owns the words they exchange, and how a rank
that leaves tells the others why. How words travel is a subclass's.

Every rank makes the same exchanges in the same order. A rank that fails says why and leaves; the others raise RankFailed with its
words, in the exchange they are in or come to next, and leave with the same words.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import msgspec

from brim.errors import EngineError, RankFailed


class RankWord(msgspec.Struct, frozen=True):
    """What one rank says in an exchange. about: what is being agreed on."""

    about: str
    values: tuple[int, ...]


class Ranks(ABC):
    """This process among its peers."""

    index: int
    size: int

    def minimum(self, about: str, values: Sequence[int]) -> tuple[int, ...]:
        """Each value's least over all ranks. Raises RankFailed where a rank failed or is gone.

        Example: blocks of (2111, 40) here and (2055, 40) there are (2055, 40) on both.
        """
        if self.size == 1:
            return tuple(values)
        mine = msgspec.msgpack.encode(RankWord(about, tuple(values)))
        words = [msgspec.msgpack.decode(word, type=RankWord) for word in self._exchange(mine)]
        if any(word.about != about or len(word.values) != len(values) for word in words):
            raise EngineError(f"Ranks do not agree on what to agree on: {', '.join(sorted({word.about for word in words}))}.")
        return tuple(min(column) for column in zip(*(word.values for word in words), strict=True))

    def fail(self, about: str, error: BaseException) -> None:
        """Leave, and let the others know why; never raises. What another rank failed of is passed on as it is."""
        if self.size > 1:
            why = str(error).rstrip(".")
            passed_on = isinstance(error, RankFailed)
            self._leave(str(error) if passed_on else f"Rank {self.index} failed in {about}: {type(error).__name__}: {why}.")

    def heed(self) -> None:  # noqa: B027  (to learn of failures in exchanges alone is a fine default)
        """Raise RankFailed where a peer is known to have failed. Waits for nobody; for the time between exchanges."""

    def close(self) -> None:
        """Leave without a word, unless this rank has left before."""
        if self.size > 1:
            self._leave("")

    @abstractmethod
    def _exchange(self, word: bytes) -> list[bytes]:
        """The words of all ranks, in their order. Raises RankFailed where one left, or does not answer in time."""

    @abstractmethod
    def _leave(self, why: str) -> None:
        """Peers that wait for this rank, now or later, raise RankFailed(why). Never raises; only the first call counts."""


class OneRank(Ranks):
    """Alone: whatever is asked is agreed."""

    index, size = 0, 1

    def _exchange(self, word: bytes) -> list[bytes]:
        return [word]

    def _leave(self, why: str) -> None:
        return


def said(reasons: Iterable[str]) -> str:
    """What ranks left behind, each reason once; "" where none gave any."""
    return " ".join(dict.fromkeys(reason for reason in reasons if reason))


def silent(missing: Sequence[int], timeout_s: float | None = None) -> str:
    """That ranks left without a word, or did not answer within timeout_s."""
    many = len(missing) > 1
    who = f"Rank{'s' * many} {', '.join(map(str, missing))}"
    if timeout_s is None:
        return f"{who} {'are' if many else 'is'} gone: no word was left."
    return f"{who} did not answer within {timeout_s:g} s."
