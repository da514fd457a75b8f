"""Start-up progress on stderr. Owns the line that shows it: rewritten in place on a terminal, one line a phase elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import IO, Any


class ProgressLine:
    """A callable for `LLM(on_progress=...)`. On a terminal one line is rewritten and vanishes at the end; in a log each new
    phase text is a line; `quiet` shows nothing."""

    def __init__(self, stream: IO[str] | None = None, *, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._rewrites = self._stream.isatty()
        self._last = ""

    def __call__(self, progress: Any) -> None:
        """Show one `engine.messages.StartupProgress`."""
        if self._quiet:
            return
        text = f"{progress.phase}: {progress.text}" if progress.text else progress.phase
        if self._rewrites:
            done = f" {progress.fraction:4.0%}" if progress.fraction is not None else ""
            self._stream.write(f"\r\x1b[K{text}{done}")
            self._stream.flush()
        elif text != self._last and progress.fraction in (None, 1.0):
            print(text, file=self._stream)
        self._last = text

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._rewrites and self._last and not self._quiet:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
