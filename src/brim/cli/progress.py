"""Start-up progress on stderr. Owns the line that shows it: rewritten in place on a terminal, a line a phase elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, TYPE_CHECKING

from brim.config.avoid import DOING

if TYPE_CHECKING:
    from brim.engine.messages import StartupProgress

_PHASES = tuple(DOING)  # in the order of a start
_BAR = 20  # characters
_SAY_EVERY_S = 10.0  # of a long phase, in a log


class ProgressLine:
    """A callable for `LLM(on_progress=...)`. On a terminal one line is rewritten and vanishes at the end; in a log each phase is
    one line, and one more each 10 s while it lasts; `quiet` shows nothing. clock: monotonic seconds."""

    def __init__(
        self, stream: IO[str] | None = None, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._clock = clock
        self._rewrites = self._stream.isatty()
        self._phase = ""
        self._said_s = 0.0

    def __call__(self, progress: StartupProgress) -> None:
        """Show one report of start-up."""
        if self._quiet:
            return
        if self._rewrites:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[K{_drawn(progress)[:width]}")
            self._stream.flush()
        elif progress.phase != self._phase or self._clock() - self._said_s >= _SAY_EVERY_S:
            again = progress.phase == self._phase and progress.fraction is not None
            done = f" ({progress.fraction:.0%})" if again else ""
            text = f"{progress.phase}: {progress.text}" if progress.text else progress.phase
            print(f"{text}{done}", file=self._stream, flush=True)
            self._said_s = self._clock()
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


def _drawn(progress: StartupProgress) -> str:
    """`2/8 load [##########          ]  50% blk.3.weight`; without a bar where nobody knows how far it is."""
    place = f"{_PHASES.index(progress.phase) + 1}/{len(_PHASES)} " if progress.phase in _PHASES else ""
    bar = ""
    if progress.fraction is not None:
        full = round(_BAR * min(1.0, max(0.0, progress.fraction)))
        bar = f" [{'#' * full}{' ' * (_BAR - full)}] {progress.fraction:4.0%}"
    return f"{place}{progress.phase}{bar or ':' * bool(progress.text)} {progress.text}".rstrip()
