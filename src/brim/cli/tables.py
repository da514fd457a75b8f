"""Tables for people. Owns how a ledger and a list of rows look on a terminal; measures and decides nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import IO, Any

from brim.memory.ledger import CATEGORIES, OURS, Ledger, LedgerLine
from brim.units import format_bytes

_BAR = 40  # characters


def print_ledger(ledger: Ledger, stream: IO[str] | None = None) -> None:
    """The ledger as `memory.report` shows it everywhere."""
    from brim.memory.report import format_ledger

    print(format_ledger(ledger), file=stream or sys.stderr)


def print_memory(memory: dict[str, Any], stream: IO[str] | None = None) -> None:
    """A `LLM.memory()` or `/memory` report: the ledger, then the KV cache in tokens, then what the process really held."""
    out = stream or sys.stderr
    print_ledger(ledger_of(memory), out)
    kv = memory.get("kv", {})
    if "kv_tokens" in kv:
        print(f"KV cache: {kv['kv_tokens']:,} tokens", file=out)
    if memory.get("peak_bytes"):
        print(f"Peak of this process: {format_bytes(memory['peak_bytes'])}", file=out)


def print_summary(memory: dict[str, Any], ready_s: float | None, stream: IO[str] | None = None) -> None:
    """The same by category in a few lines of at most 80 columns: what a start came to."""
    ledger, kv = ledger_of(memory), memory.get("kv", {})
    out = stream or sys.stderr
    ready = f"Ready in {ready_s:.1f} s. " if ready_s is not None else ""
    tokens = f"; KV cache: {kv['kv_tokens']:,} tokens" if "kv_tokens" in kv else ""
    print(f"{ready}{format_bytes(ledger.held_bytes)} of a cap of {format_bytes(ledger.cap_bytes)} held{tokens}", file=out)
    held = {category: ledger.bytes_of(category) for category in CATEGORIES if category in OURS}
    for category, num_bytes in held.items():
        if num_bytes:
            bar = "#" * round(_BAR * max(0, num_bytes) / max(held.values()))
            print(f"  {category:<13}{format_bytes(num_bytes):>12}{num_bytes / ledger.held_bytes:>6.0%}  {bar}".rstrip(), file=out)


def ledger_of(memory: dict[str, Any]) -> Ledger:
    """The ledger of such a report, as it was."""
    lines = tuple(LedgerLine(x["category"], x["owner"], x["bytes"], x["known_by"]) for x in memory["ledger"])
    return Ledger(memory["cap_bytes"], memory.get("total_bytes", memory["cap_bytes"]), lines)


def print_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: set[int] | None = None,
    stream: IO[str] | None = None,
) -> None:
    """Columns as wide as their widest cell; the columns in `right` are flush right."""
    out = stream or sys.stderr
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for index, line in enumerate(lines):
        if index == 1:
            print("  ".join("-" * width for width in widths), file=out)
        cells = [cell.rjust(widths[i]) if i in (right or ()) else cell.ljust(widths[i]) for i, cell in enumerate(line)]
        print("  ".join(cells).rstrip(), file=out)
