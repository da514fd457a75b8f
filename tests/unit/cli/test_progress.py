"""Start-up progress for people and for logs."""

from __future__ import annotations

import pytest
from tests.unit.cli.conftest import Terminal

from brim.cli.progress import ProgressLine
from brim.engine.messages import StartupProgress

REPORTS = [StartupProgress("load", "reading weights"), StartupProgress("load", "x" * 200, 0.5), StartupProgress("prove", "")]


def shown(stream: Terminal, *, quiet: bool = False) -> str:
    with ProgressLine(stream, quiet=quiet) as progress:
        for report in REPORTS:
            progress(report)
    return stream.written


def test_a_log_gets_one_line_a_phase() -> None:
    assert shown(Terminal()) == "load: reading weights\nprove\n"


def test_a_terminal_gets_one_line_that_vanishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    drawn = shown(Terminal(is_terminal=True)).split("\r\x1b[K")
    assert drawn == ["", "load: reading weights", "load: " + "x" * 28 + "  50%", "prove", ""]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_quiet_shows_nothing(is_terminal: bool) -> None:
    assert shown(Terminal(is_terminal=is_terminal), quiet=True) == ""
