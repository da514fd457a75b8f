"""How `brim doctor` looks to people: tables of 80 columns, plain where nobody sits at a terminal. Owns form only."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import IO, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from brim.cli.tables import ledger_of, print_ledger
from brim.units import format_bytes

WIDTH = 80
_WORDS = {"passed": "ok", "failed": "FAILED", "not_supported": "not there", "not_tried": "not tried"}
_COLOURS = {"passed": "green", "failed": "bold red", "not_supported": "dim", "not_tried": "yellow"}
_LEFT_OUT = frozenset({"platform", "total_bytes", "limit_source", "trusted_readings", "python", "torch", "device"})


def print_report(found: dict[str, Any], stream: IO[str]) -> None:
    """Machine, readings, checks, start-up, and what to do."""
    text = io.StringIO()
    console = Console(file=text, width=WIDTH, force_terminal=stream.isatty(), highlight=False, markup=False, emoji=False)
    _machine(console, found)
    if found["readings"]:
        _readings(console, found["readings"])
    if found["checks"]:
        _checks(console, found["checks"])
    if found["start"]:
        _start(console, found["start"])
    if found["avoided"]:
        _avoided(console, found["avoided"])
    _verdict(console, found)
    stream.write("".join(f"{line.rstrip()}\n" for line in text.getvalue().strip("\n").splitlines()))


def print_profile(found: dict[str, Any], stream: IO[str]) -> None:
    """What a calibration measured and where it lies."""
    console = Console(file=stream, width=WIDTH, highlight=False, markup=False, emoji=False)
    rows = [
        (name, _value(name, figure["value"]), figure["source"].partition(";")[0]) for name, figure in found["figures"].items()
    ]
    _table(console, f"Profile {found['profile']}, measured by {found['starts']} starts", ("figure", "", "how"), rows, {1})
    for failure in found["failures"]:
        console.print(f"Left out: {failure}")
    console.print(f"\nWritten to {found['file']}")


def _table(console: Console, title: str, header: Sequence[str], rows: Iterable[Sequence[str | Text]], right: set[int]) -> None:
    """Columns that wrap rather than pass the width; the first never does."""
    console.print(f"\n{title}", style="bold")
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for index, name in enumerate(header):
        last = index == len(header) - 1
        table.add_column(name, justify="right" if index in right else "left", no_wrap=not last, overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    console.print(table)


def _machine(console: Console, found: dict[str, Any]) -> None:
    machine = found["machine"]
    chosen = machine["platform"] if machine else None
    rows = []
    for row in found["platforms"]:
        state = "chosen" if row["name"] == chosen else "works" if row["opened"] else "no"
        rows.append((row["name"], state, row["reason"]))
    _table(console, "Platforms", ("name", "", "device, or why not"), rows, set())
    if machine is None:
        return
    described = machine["describe"]
    details = [("device", str(described.get("device", "")))]
    details += [(key.replace("_", " "), _value(key, value)) for key, value in described.items() if key not in _LEFT_OUT]
    details.append(("versions", ", ".join(f"{name} {text}" for name, text in machine["versions"].items())))
    yes = [name for name, value in machine["capabilities"].items() if value is True]
    no = [name for name, value in machine["capabilities"].items() if value is False]
    capabilities = machine["capabilities"]
    details.append(("declares", ", ".join(yes) or "-"))
    details.append(("declares not", ", ".join(no) or "-"))
    details.append(("dtypes", ", ".join(capabilities["dtypes"])))
    details.append(("arena", f"{capabilities['arena_backend']}, by {format_bytes(capabilities['granularity_bytes'])}"))
    _table(console, "Machine", ("", ""), details, set())


def _readings(console: Console, readings: dict[str, Any]) -> None:
    trusted = "trusted" if readings["trusted"] else f"not trusted: {readings['reason']}"
    rows: list[Sequence[str]] = [
        ("total", format_bytes(readings["total_bytes"]), readings["limit_source"]),
        ("free", format_bytes(readings["free_bytes"]), trusted),
        ("ours", format_bytes(readings["ours_bytes"]), "this process, nothing loaded"),
        ("others", format_bytes(readings["others_bytes"]), ""),
        ("reserve", format_bytes(readings["reserve_bytes"]), "stays free"),
    ]
    for cap in readings["caps"]:
        size = format_bytes(cap["cap_bytes"]) if cap["cap_bytes"] is not None else "-"
        chosen = "Chosen. " if cap["chosen"] else ""
        why = cap["refused"] or " ".join(cap["reasons"])
        rows.append((f"cap by {cap['memory']}", size, f"{chosen}{why}"))
    _table(console, "Readings", ("", "bytes", "from"), rows, {1})


def _checks(console: Console, checks: Sequence[dict[str, Any]]) -> None:
    rows = []
    for check in checks:
        outcome = Text(_WORDS[check["outcome"]], style=_COLOURS[check["outcome"]] if console.is_terminal else "")
        rows.append((check["name"], outcome, f"{check['seconds']:.2f}", _finding(check)))
    _table(console, "Checks", ("check", "", "seconds", "found"), rows, {2})


def _finding(check: dict[str, Any]) -> str:
    if check["outcome"] == "failed":
        return f"To {check['did']}: {check['reason']}"
    if check["outcome"] != "passed":
        return str(check["reason"])
    figures = ", ".join(f"{_words(key)} {_value(key, value)}" for key, value in check["figures"].items())
    return ". ".join(part.rstrip(".") for part in (check["note"], figures) if part) or check["did"]


def _words(key: str) -> str:
    return key.removesuffix("_bytes").removesuffix("_ms").replace("_", " ")


def _value(key: str, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and ("_bytes" in key):
        return format_bytes(value)
    if isinstance(value, float):
        return f"{value:.2g} ms" if key.endswith("_ms") else f"{value:.2g}"
    return str(value)


def _start(console: Console, start: dict[str, Any]) -> None:
    rows = []
    if start["model"] is not None:
        rows.append(("model", start["model"], f"computed in {start['dtype']}" if "dtype" in start else ""))
    arena = start["arena"]
    rows.append(("arena", arena["backend"], arena["reason"]))
    if "kernels" in start:
        rows.append(("kernels", start["kernels"]["name"], start["kernels"]["reason"]))
        if "weights" in start:
            kept, _, why = start["weights"].partition(": ")
            rows.append(("weights", kept, why))
        rows.append(("graph mode", start["graph_mode"]["mode"], start["graph_mode"]["reason"]))
        for name, limit in start["limits"].items():
            rows.append((name.replace("_", " "), f"{limit['value']:,}", f"from: {limit['source']}"))
    _table(console, "What start-up would do", ("", "choice", "why"), rows, set())
    plan = start.get("plan")
    if plan is not None:
        console.print()
        print_ledger(ledger_of(plan), console.file)
        kv = plan["kv"]
        text = f"KV cache: {format_bytes(kv['bytes'])}, {kv['tokens']:,} tokens: {kv['full_length_requests']:,} requests of "
        console.print(f"\n{text}{kv['max_model_len']:,} tokens at once.")
        for reason in plan["reasons"]:
            console.print(reason)


def _avoided(console: Console, records: Sequence[dict[str, Any]]) -> None:
    """What starts do without, each where it holds."""
    rows = []
    for record in records:
        identity = record["identity"]
        where = f"{identity.get('model', '')} on {identity.get('device', '')}, {record['written'][:10]}"
        for one in record["avoided"]:
            words = f"{one['feature'].replace('_', ' ')}: {one['most']}"
            rows.append((words, f"{where}: {one['reason']}"))
    _table(console, "What starts do without (brim doctor --forget: try it again)", ("at most", "where, and why"), rows, set())


def _verdict(console: Console, found: dict[str, Any]) -> None:
    console.print()
    refused = (found["start"] or {}).get("refused")
    if refused:
        console.print(f"A start would be refused: {refused['message']}")
        if refused["ledger"]:
            print_ledger(ledger_of(refused["ledger"]), console.file)
    for problem in found["problems"]:
        console.print(f"Problem: {problem}")
    for row in found["contradictions"]:
        without = f" Start without it: {row['workaround']}." if row["workaround"] else ""
        console.print(f"Declared but not working: {row['capability']} ({row['name']}).{without}")
    for check in found["checks"]:
        if check["outcome"] == "failed" and not check["capability"]:
            without = f" Start without it: {check['workaround']}." if check["workaround"] else ""
            console.print(f"Not working: {check['name']}.{without}")
    counts = {outcome: sum(check["outcome"] == outcome for check in found["checks"]) for outcome in _WORDS}
    tally = ", ".join(f"{counts[outcome]} {word}" for outcome, word in _WORDS.items() if counts[outcome])
    verdict = "All is well" if found["ok"] else "Not all is well"
    console.print(f"{verdict}: {tally or 'no check could be made'}, in {found['seconds']:.1f} s.")
