"""What a start has said of itself so far, and what to do without if it dies now. Owns phase, features and signs of life.

Torch-free: it watches from another process (`supervisor`) or from beside the start (`LLM`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from brim.config.avoid import DOING, StartUses, flag_for, next_avoided
from brim.config.schema import Avoided
from brim.engine.messages import StartupProgress

_LONG_S = 1800.0  # phases in which one step, or one compiler, works without saying a word
_SHORT_S = 600.0
_WORST_STEP_FACTOR = 10


@dataclass(frozen=True, slots=True)
class SilenceLimits:
    """How long an engine process may say nothing. by_phase: of a start, by phase; unknown phases (and the time before the first,
    in which a model may be downloaded) have no limit. ping_s: how often one that serves is asked for a sign of life at least."""

    by_phase: Mapping[str, float] = field(
        default_factory=lambda: {
            "open": _SHORT_S, "load": _SHORT_S, "reserve": _SHORT_S, "warm": _LONG_S, "measure": _LONG_S, "capture": _SHORT_S,
            "commit": _LONG_S, "prove": _LONG_S,
        }
    )  # fmt: skip

    def of_start(self, phase: str) -> float | None:
        """Seconds; None: for ever."""
        return self.by_phase.get(phase)


@dataclass(slots=True)
class PhaseSoFar:
    """One phase of a start as it is seen from here. fraction: of its work, where it says so."""

    name: str
    text: str
    fraction: float | None = None
    began_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None

    @property
    def is_done(self) -> bool:
        """The next one began, or the engine serves."""
        return self.ended_s is not None

    @property
    def seconds(self) -> float:
        """It took, or has taken so far."""
        return (time.monotonic() if self.ended_s is None else self.ended_s) - self.began_s


class StartWatch:
    """One start, from its first word on."""

    def __init__(self) -> None:
        self.phase = ""
        self.phases: list[PhaseSoFar] = []
        self.uses = StartUses()
        self.identity: dict[str, str] = {}
        self.worst_step_s = 0.0
        self._said_s = time.monotonic()

    def note(self, progress: StartupProgress) -> None:
        """The start said this."""
        now = time.monotonic()
        if self.phase == progress.phase == "prove":
            self.worst_step_s = max(self.worst_step_s, now - self._said_s)
        self.phase, self._said_s = progress.phase, now
        self._note_phase(progress, now)
        if progress.uses is not None:
            self.uses = progress.uses
        if progress.identity is not None:
            self.identity = progress.identity

    def _note_phase(self, progress: StartupProgress, now: float) -> None:
        if all(one.name != progress.phase for one in self.phases):
            self._end_phase(now)
            self.phases.append(PhaseSoFar(progress.phase, progress.text, progress.fraction, now))
        elif self.phases[-1].name == progress.phase:  # an earlier one's word is part of what the present one does
            self.phases[-1].text, self.phases[-1].fraction = progress.text, progress.fraction

    def _end_phase(self, now: float) -> None:
        if self.phases and not self.phases[-1].is_done:
            self.phases[-1].ended_s = now

    def noting(self, on_progress: Callable[[StartupProgress], None]) -> Callable[[StartupProgress], None]:
        """Note what is said, then pass it on."""

        def note(progress: StartupProgress) -> None:
            self.note(progress)
            on_progress(progress)

        return note

    def note_ready(self) -> None:
        """The last proven step is done."""
        if self.phase == "prove":
            self.worst_step_s = max(self.worst_step_s, time.monotonic() - self._said_s)
        self._end_phase(time.monotonic())

    def blame(self, how: str) -> Avoided | None:
        """What to do without, should it have died now; None where nothing can be taken away."""
        return next_avoided(self.phase, self.uses, how)

    def hint(self, message: str) -> str:
        """A death's message with the setting that does without what was under way."""
        avoided = self.blame("")
        if avoided is None:
            return message
        return f"{message.rstrip('.')}. It happened while {DOING[self.phase]}; try {flag_for(avoided)}."

    def step_limit_s(self, timeout_s: float) -> float | None:
        """How long this engine may give no sign of life while it serves; None where timeout_s is 0: for ever."""
        return timeout_s + _WORST_STEP_FACTOR * self.worst_step_s if timeout_s > 0 else None
