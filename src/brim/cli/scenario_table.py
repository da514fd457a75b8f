"""How scenarios look to people: one as a start-up report with its verdict, several as a table. Owns form only."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table

WIDTH = 80


def print_scenarios(found: Sequence[dict[str, Any]], stream: IO[str], width: int = WIDTH) -> None:
    """One row a scenario: what the reported engine did, what Brim does, KV of the optimum; then what did not hold."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("scenario", "reported engine", "Brim", "of optimum"):
        table.add_column(name, overflow="fold", justify="right" if name == "of optimum" else "left")
    for one in found:
        share = "-" if one["share"] is None else f"{one['share']:.3f}"
        table.add_row(Path(one["file"]).stem, one["reported"], ("" if one["ok"] else "WRONG: ") + one["outcome"], share)
    text = io.StringIO()
    Console(file=text, width=width, highlight=False, markup=False, emoji=False).print(table)
    stream.write("".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines()))
    wrong = [one for one in found if not one["ok"]]
    stream.write(f"\n{len(found) - len(wrong)} of {len(found)} scenarios hold, {sum(one['seconds'] for one in found):.1f} s.\n")
    for one in wrong:
        stream.write(f"\n{Path(one['file']).stem}:\n{_items(one['wrong'])}")


def print_scenario(one: dict[str, Any], stream: IO[str]) -> None:
    """The start-up report as a real start prints it, then what was served and what did not hold."""
    stream.write(
        f"{_wrapped(one['title'])}\n{_wrapped('Reported: ' + one['reported'] + ' (' + ', '.join(one['sources']) + ')')}\n\n"
    )
    if one["report"]:
        stream.write(f"{one['report']}\n\n")
    stream.write(f"{_wrapped('Brim ' + one['outcome'] + ('.' if one['reason'] is None else '. ' + one['reason']))}\n")
    for without in one["without"]:
        stream.write(f"{_wrapped('Without ' + without['feature'] + ': ' + without['reason'])}\n")
    if one["share"] is not None:
        stream.write(f"{_wrapped('Graph mode ' + one['graph_mode'] + ': ' + one['graph_mode_reason'])}\n")
        kv = f"KV cache: {one['kv_tokens']:,} tokens, {one['share']:.4f} of the {one['optimum_tokens']:,} that were possible."
        served = f"Served {one['tokens']:,} tokens to {one['requests']} requests, {one['failed_requests']} failed."
        stream.write(f"{kv}\n{served}\n")
    stream.write("All that must hold does.\n" if one["ok"] else f"What must hold but does not:\n{_items(one['wrong'])}")


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH)


def _items(sentences: Sequence[str]) -> str:
    return "".join(f"{textwrap.fill(text, WIDTH, initial_indent='- ', subsequent_indent='  ')}\n" for text in sentences)
