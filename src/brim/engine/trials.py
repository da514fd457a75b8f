"""Work that may kill its process, tried in a child that writes one JSON line a step. Owns both ends of that stream. Torch-free.

The child announces its steps, then says of each that it begins and what it answered. A child that dies or hangs under a step
makes that step's end a death, and a new child goes on with the next one: a lost device is a finding, never the end of whoever
asked. Nothing is tried twice.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any

STEP_TIMEOUT_S = 30.0
_START_TIMEOUT_S = 90.0
_LAST_WORDS_BYTES = 8192
_LAST_WORDS_CHARACTERS = 240
_STDOUT, _STDERR = 1, 2


@dataclass(frozen=True, slots=True)
class TrialStep:
    """One step of a child. facts: what the parent says of it where the child could not answer (plain JSON values)."""

    name: str
    timeout_s: float = STEP_TIMEOUT_S
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrialEnd:
    """How a step ended: value is the child's answer. Where there is none, `why` says how the process ended under the step
    (tried) or why the step was never begun (not tried)."""

    step: TrialStep
    value: dict[str, Any] | None
    why: str = ""
    tried: bool = True


class StopTrials(Exception):
    """Raised in a child: what it needs for all further steps is not there. The message says why."""


class ChildEnds(Exception):
    """Raised in a child after an answer: this process is of no more use, a new one should go on. Carries the answer."""

    def __init__(self, value: dict[str, Any]) -> None:
        super().__init__("a new process goes on")
        self.value = value


def answer_trials(
    steps: Sequence[TrialStep], done: Collection[str], begin: Callable[[], Callable[[str], dict[str, Any]]]
) -> None:
    """The child's end: announce, then run what is not done. `begin` prepares and returns what runs a step by its name.

    Stdout belongs to the stream: whatever else this process and its libraries print goes to stderr. A step that hangs past
    its time ends the process even where nobody watches.
    """
    faulthandler.enable()
    with _own_stdout() as out:

        def say(event: str, **rest: Any) -> None:
            out.write(json.dumps({"event": event, **rest}) + "\n")
            out.flush()

        say("steps", steps=[asdict(step) for step in steps])
        try:
            attempt = begin()
            for step in steps:
                if step.name in done:
                    continue
                say("begin", name=step.name)
                faulthandler.dump_traceback_later(2 * step.timeout_s, exit=True)
                try:
                    say("end", name=step.name, value=attempt(step.name))
                except ChildEnds as last:
                    say("end", name=step.name, value=last.value)
                    return
                finally:
                    faulthandler.cancel_dump_traceback_later()
        except StopTrials as stop:
            say("stop", why=str(stop))


@contextlib.contextmanager
def _own_stdout() -> Iterator[IO[str]]:
    sys.stdout.flush()
    with os.fdopen(os.dup(_STDOUT), "w", encoding="utf-8") as out:
        os.dup2(_STDERR, _STDOUT)
        yield out


def run_trials(
    command: Sequence[str],
    task: dict[str, Any],
    *,
    start_timeout_s: float = _START_TIMEOUT_S,
    on_begin: Callable[[TrialStep], None] = lambda step: None,
) -> Iterator[TrialEnd]:
    """The parent's end: every step's end, in order. `command` gets the task, with the names already done, as its last argument.

    start_timeout_s bounds what lies between steps: the start of a child and what it prepares.
    """
    trials = _Trials(start_timeout_s, on_begin)
    while True:
        child = _Child([*command, json.dumps({**task, "done": sorted(trials.done)})])
        try:
            yield from trials.follow(child)
        finally:
            child.kill()
        if trials.stopped is not None:
            for step in trials.open_steps:
                yield TrialEnd(step, None, trials.stopped, tried=False)
            return


class _Trials:
    """What is known over all children. stopped: why no further child is started; an empty text where all is done."""

    def __init__(self, start_timeout_s: float, on_begin: Callable[[TrialStep], None]) -> None:
        self.steps: list[TrialStep] = []
        self.done: set[str] = set()
        self.stopped: str | None = None
        self._start_timeout_s = start_timeout_s
        self._on_begin = on_begin

    @property
    def open_steps(self) -> list[TrialStep]:
        """Steps without an end."""
        return [step for step in self.steps if step.name not in self.done]

    def follow(self, child: _Child) -> Iterator[TrialEnd]:
        """One child from its start to its end."""
        done_before = len(self.done)
        current: TrialStep | None = None
        while (said := child.next(current.timeout_s if current else self._start_timeout_s)) is not None:
            if said["event"] == "steps":
                self.steps = [TrialStep(**step) for step in said["steps"]]
            elif said["event"] == "begin":
                current = next(step for step in self.steps if step.name == said["name"])
                self._on_begin(current)
            elif said["event"] == "end" and current is not None:
                self.done.add(current.name)
                yield TrialEnd(current, said["value"])
                current = None
            elif said["event"] == "stop":
                self.stopped = said["why"]
                return
        death = child.death(current.timeout_s if current else self._start_timeout_s)
        if current is not None:
            self.done.add(current.name)
            yield TrialEnd(current, None, death)
        if not self.steps:
            self.steps = [TrialStep("start")]
        if not self.open_steps:
            self.stopped = ""
        elif len(self.done) == done_before:
            self.stopped = f"The process could not begin: {death}."


class _Child:
    """One child process, in a group of its own so that whatever it started ends with it."""

    def __init__(self, command: Sequence[str]) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (kill() closes it)
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._stderr, start_new_session=True
        )
        self._hung = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                if isinstance(said, dict) and "event" in said:
                    self._lines.put(said)
        self._lines.put(None)

    def next(self, timeout_s: float) -> dict[str, Any] | None:
        """What it says next; None where it has ended, or said nothing for that long and was killed."""
        try:
            return self._lines.get(timeout=timeout_s)
        except queue.Empty:
            self._hung = True
            self._signal()
            return None

    def death(self, timeout_s: float) -> str:
        """How it ended, with its last words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.returncode
        if self._hung:
            how = f"hung: it said nothing for {timeout_s:g} s and was killed"
        elif code is None:
            how = "closed its output without ending"
        elif code < 0:
            how = f"was killed by signal {_signal_name(-code)}"
        else:
            how = f"ended with exit code {code}"
        words = self._last_words()
        return f"the process {how}{': ' + words if words else ''}".rstrip(".")

    def _last_words(self) -> str:
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - _LAST_WORDS_BYTES))
        lines = [line.strip() for line in self._stderr.read().decode("utf-8", "replace").splitlines() if line.strip()]
        fatal = [line for line in lines if line.startswith("Fatal")]
        return (fatal or lines[-1:] or [""])[0][:_LAST_WORDS_CHARACTERS]

    def _signal(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """End it and everything it started, whatever state it is in."""
        self._signal()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._reader.join(1)
        if self._process.stdout is not None and not self._reader.is_alive():
            self._process.stdout.close()
        self._stderr.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
