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
    assert drawn == ["", "2/8 load: reading weights", "2/8 load [##########          ]  50% xx", "8/8 prove", ""]
    assert max(map(len, drawn)) < 40


def test_a_long_phase_speaks_again_in_a_log() -> None:
    now_s, stream = [0.0], Terminal()
    with ProgressLine(stream, clock=lambda: now_s[0]) as progress:
        for seconds in range(25):
            now_s[0] = float(seconds)
            progress(StartupProgress("load", f"layer {seconds}", seconds / 25))
            progress(StartupProgress("load", f"layer {seconds}", seconds / 25))
    assert stream.written == "load: layer 0\nload: layer 10 (40%)\nload: layer 20 (80%)\n"


def test_phases_that_are_no_starts_have_no_place() -> None:
    stream = Terminal(is_terminal=True)
    with ProgressLine(stream) as progress:
        progress(StartupProgress("doctor", "memory", 2.0))
    assert "doctor [####################] 200% memory" in stream.written


@pytest.mark.parametrize("is_terminal", [True, False])
def test_quiet_shows_nothing(is_terminal: bool) -> None:
    assert shown(Terminal(is_terminal=is_terminal), quiet=True) == ""
