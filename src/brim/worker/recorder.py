"""Times and weighs each phase of start-up. Owns the phase records and tells the user what happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from brim.engine.messages import StartupProgress
from brim.platforms.base import Platform


@dataclass(frozen=True, slots=True)
class PhaseRecord:
    """What one phase took. held_bytes: what this process held when it ended; peak_bytes: the most it held during it."""

    name: str
    seconds: float
    delta_bytes: int
    held_bytes: int
    peak_bytes: int


class PhaseRecorder:
    """Collects PhaseRecords; progress goes to the callback as StartupProgress."""

    def __init__(self, platform: Platform, on_progress: Callable[[StartupProgress], None]) -> None:
        self._platform = platform
        self._on_progress = on_progress
        self._phase = ""
        self.records: list[PhaseRecord] = []

    @contextmanager
    def phase(self, name: str, text: str) -> Iterator[None]:
        """Measure what happens inside as phase `name`."""
        self._phase = name
        self.progress(text, None)
        before = self._platform.reading().ours_bytes
        self._platform.reset_peak()
        started = time.perf_counter()
        yield
        self._platform.synchronize()
        seconds = time.perf_counter() - started
        held = self._platform.reading().ours_bytes
        peak = max(held, self._platform.peak_ours_bytes())
        self.records.append(PhaseRecord(name, seconds, held - before, held, peak))

    def progress(self, text: str, fraction: float | None) -> None:
        """Tell the user where the running phase is."""
        self._on_progress(StartupProgress(self._phase, text, fraction))

    @property
    def peak_bytes(self) -> int:
        """The most this process held in any phase so far."""
        return max((record.peak_bytes for record in self.records), default=0)
