"""Tables for people. Owns how a ledger and a list of rows look on a terminal; measures and decides nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, Any

from brim.units import format_bytes

if TYPE_CHECKING:
    from brim.memory.ledger import Ledger

_NOT_OURS = frozenset({"other_processes", "reserve", "free"})


def ledger_rows(ledger: Ledger) -> list[dict[str, Any]]:
    """The lines of a ledger in the form `/memory` and `LLM.memory()` give them."""
    return [{"category": x.category, "owner": x.owner, "bytes": x.num_bytes, "known_by": x.known_by} for x in ledger.lines]


def print_ledger(rows: Sequence[dict[str, Any]], cap_bytes: int, stream: IO[str] | None = None) -> None:
    """The ledger as a table: a line an owner, then what is held of the cap."""
    held_bytes = sum(row["bytes"] for row in rows if row["category"] not in _NOT_OURS)
    cells = [(row["category"], row["owner"], format_bytes(row["bytes"]), row["known_by"]) for row in rows]
    cells.append(("held", f"of the cap {format_bytes(cap_bytes)}", format_bytes(held_bytes), share(held_bytes, cap_bytes)))
    print_table(("CATEGORY", "OWNER", "SIZE", "KNOWN BY"), cells, right={2}, stream=stream, rule_before=len(cells) - 1)


def print_memory(memory: dict[str, Any], stream: IO[str] | None = None) -> None:
    """A `LLM.memory()` report: the ledger, then the KV cache in tokens."""
    out = stream or sys.stderr
    print_ledger(memory["ledger"], memory["cap_bytes"], out)
    kv = memory.get("kv") or {}
    total = kv.get("tokens_total", kv.get("tokens"))
    if isinstance(total, int):
        print(f"KV cache: {total:,} tokens", file=out)


def share(part: int, whole: int) -> str:
    """`share(1, 4) == '25.0%'`; a dash where there is no whole."""
    return f"{100 * part / whole:.1f}%" if whole else "-"


def print_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: set[int] | None = None,
    stream: IO[str] | None = None,
    rule_before: int | None = None,
) -> None:
    """Columns as wide as their widest cell; the columns in `right` are flush right. A rule goes before row `rule_before`."""
    out = stream or sys.stderr
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for index, line in enumerate(lines):
        if index == 1 or (rule_before is not None and index == rule_before + 1):
            print("  ".join("-" * width for width in widths), file=out)
        cells = [cell.rjust(widths[i]) if i in (right or ()) else cell.ljust(widths[i]) for i, cell in enumerate(line)]
        print("  ".join(cells).rstrip(), file=out)
