"""Start-up progress on stderr. Owns the line that shows it: rewritten in place on a terminal, one line a phase elsewhere."""

from __future__ import annotations

import shutil
import sys
from types import TracebackType
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from brim.engine.messages import StartupProgress


class ProgressLine:
    """A callable for `LLM(on_progress=...)`. On a terminal one line is rewritten and vanishes at the end; in a log each phase
    is one line; `quiet` shows nothing."""

    def __init__(self, stream: IO[str] | None = None, *, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._rewrites = self._stream.isatty()
        self._phase = ""

    def __call__(self, progress: StartupProgress) -> None:
        """Show one report of start-up."""
        if self._quiet:
            return
        text = f"{progress.phase}: {progress.text}" if progress.text else progress.phase
        if self._rewrites:
            done = f" {progress.fraction:4.0%}" if progress.fraction is not None else ""
            room = shutil.get_terminal_size().columns - len(done) - 1
            self._stream.write(f"\r\x1b[K{text[:room]}{done}")
            self._stream.flush()
        elif progress.phase != self._phase:
            print(text, file=self._stream, flush=True)
        self._phase = progress.phase

    def clear(self) -> None:
        """Take the line off the terminal."""
        if self._rewrites and self._phase:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
        self._phase = ""

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.clear()
