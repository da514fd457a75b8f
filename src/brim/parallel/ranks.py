"""What several ranks agree on before anything is built from it: always the least. Owns the words they exchange, and how a rank
that fails tells the others why. How words travel is a subclass's.

Every rank makes the same exchanges in the same order. A rank that fails takes part in one more exchange, with its reason in place
of figures, and leaves; the others raise RankFailed there, whatever they were about to agree on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from brim.errors import EngineError, RankFailed

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RankWord:
    """What one rank says in an exchange. about: what is being agreed on; reason: why this rank cannot go on, "" where it can."""

    about: str
    values: tuple[int, ...] = ()
    reason: str = ""


class Ranks(ABC):
    """This process among its peers."""

    index: int
    size: int

    @abstractmethod
    def _exchange(self, word: bytes) -> list[bytes]:
        """The words of all ranks, in their order. Raises RankFailed where one does not answer in time."""

    def minimum(self, about: str, values: Sequence[int]) -> tuple[int, ...]:
        """Each value's least over all ranks. Raises RankFailed where a rank failed or is gone.

        Example: blocks of (2111, 40) here and (2055, 40) there are (2055, 40) on both.
        """
        if self.size == 1:
            return tuple(values)
        words = self._words(RankWord(about, tuple(values)))
        if any(word.about != about or len(word.values) != len(values) for word in words):
            raise EngineError(f"Ranks do not agree on what to agree on: {', '.join(sorted({word.about for word in words}))}.")
        return tuple(min(column) for column in zip(*(word.values for word in words), strict=True))

    def least(self, about: str, choice: T, ordered: Sequence[T]) -> T:
        """The choice that stands first in `ordered` over all ranks."""
        (place,) = self.minimum(about, [ordered.index(choice)])
        return ordered[place]

    def fail(self, about: str, error: BaseException) -> None:
        """Tell the others why this rank leaves; never raises. A rank that leaves because another one did says nothing."""
        if self.size > 1 and not isinstance(error, RankFailed):
            try:
                self._words(RankWord(about, reason=f"{type(error).__name__}: {error}"))
            except (RankFailed, EngineError):  # others failed too, or are gone
                return

    def close(self) -> None:  # noqa: B027  (nothing to close is a fine default)
        """Leave. Peers that wait for this rank are told that it is gone, as soon as the transport notices."""

    def _words(self, word: RankWord) -> list[RankWord]:
        decode = msgspec.msgpack.Decoder(RankWord).decode
        words = [decode(one) for one in self._exchange(msgspec.msgpack.encode(word))]
        failed = [(index, one) for index, one in enumerate(words) if one.reason]
        if failed:
            raise RankFailed(" ".join(f"Rank {index} failed in {one.about}: {one.reason.rstrip('.')}." for index, one in failed))
        return words


class OneRank(Ranks):
    """Alone: whatever is asked is agreed."""

    index, size = 0, 1

    def _exchange(self, word: bytes) -> list[bytes]:
        return [word]
