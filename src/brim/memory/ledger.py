"""The account of every byte. Owns ledger lines, their categories and the sums over them; prints nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Category = Literal[
    "context",
    "weights",
    "buffers",
    "workspace",
    "activations",
    "graphs",
    "kv_cache",
    "adapters",
    "other_processes",
    "reserve",
    "free",
    "unattributed",
]
KnownBy = Literal["computed", "measured", "predicted"]

CATEGORIES: tuple[Category, ...] = Category.__args__  # type: ignore[attr-defined]
OURS: frozenset[Category] = frozenset(CATEGORIES) - {"other_processes", "reserve", "free"}


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """`num_bytes` held by `owner` under `category`, and how that is known."""

    category: Category
    owner: str
    num_bytes: int
    known_by: KnownBy


@dataclass(frozen=True, slots=True)
class Ledger:
    """Lines in the order they were taken, under the cap they must keep. total_bytes is the device's (or our slice's) size."""

    cap_bytes: int
    total_bytes: int
    lines: tuple[LedgerLine, ...] = ()

    def with_line(self, category: Category, owner: str, num_bytes: int, known_by: KnownBy) -> Ledger:
        """This ledger plus one line."""
        return self.with_lines([LedgerLine(category, owner, num_bytes, known_by)])

    def with_lines(self, lines: Iterable[LedgerLine]) -> Ledger:
        """This ledger plus `lines`."""
        return Ledger(self.cap_bytes, self.total_bytes, (*self.lines, *lines))

    def without(self, *categories: Category) -> Ledger:
        """This ledger less every line of `categories` (a prediction about to be replaced by a measurement)."""
        return Ledger(self.cap_bytes, self.total_bytes, tuple(x for x in self.lines if x.category not in categories))

    def bytes_of(self, category: Category) -> int:
        """Sum of one category."""
        return sum(line.num_bytes for line in self.lines if line.category == category)

    @property
    def held_bytes(self) -> int:
        """Everything this process holds: all lines but other_processes, reserve and free."""
        return sum(line.num_bytes for line in self.lines if line.category in OURS)

    @property
    def headroom_bytes(self) -> int:
        """What the cap still allows; negative where the account is over it."""
        return self.cap_bytes - self.held_bytes
