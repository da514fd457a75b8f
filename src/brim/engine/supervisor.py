"""Keeps an engine process alive beside a front end. Owns its start, its end, and bringing it back; not the requests.

    starting -> ready -> down -> starting ... -> stopped

A start that dies is tried again at once without the feature its last phase puts under suspicion (`config.avoid`), as long as
there is one and --strict is not given; what was taken away is recorded when the engine serves. Else the first start fails for
good (its BrimError is raised) and later ones are tried again and again, with growing pauses. An engine that says nothing for
longer than its phase, or its worst step, explains is killed: that is a death like any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

import brim.errors as errors
from brim.config.avoid import DOING, apply_avoided, flag_for, merge, said_of_death, without
from brim.config.avoid_record import write_record
from brim.config.schema import Avoided, BrimConfig
from brim.engine.engine_child import EngineProcess
from brim.engine.launched_process import ENGINE_COMMAND, LaunchedProcess
from brim.engine.messages import ControlCall, ControlReply, EngineFailed, EngineReady, FromEngine, StartupProgress, ToEngine
from brim.engine.start_watch import PhaseSoFar, SilenceLimits, StartWatch
from brim.errors import BrimError, EngineDead, EngineError, MemoryBudgetError, OutOfDeviceMemory

State = Literal["starting", "ready", "down", "stopped"]
# What an engine process says of itself before it ends, where a feature may be to blame; "EngineError": an internal error, such as
# one of a vendor's library that nobody knows. Others (settings, models, memory) are answers, not deaths.
_DEATHS = frozenset({"DeviceLost", "DeviceError", "EngineError"})
_PING_ID = -1
_CHECKS = 8  # of silence, within its limit
_SHORTEST_CHECK_S, _LONGEST_CHECK_S = 0.05, 1.0  # the limit is another one from one moment to the next, when it is ready


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """Pauses before a restart: first_pause_s, doubled with each failure up to most_pause_s; new after stable_s of service."""

    first_pause_s: float = 0.25
    most_pause_s: float = 30.0
    stable_s: float = 60.0

    def pause_s(self, num_failures: int) -> float:
        """`RestartPolicy().pause_s(3) == 1.0`."""
        return min(self.most_pause_s, self.first_pause_s * float(1 << min(num_failures - 1, 30)))


class Supervisor:
    """Starts an engine process, tells what it says, notices its end and starts it again.

    on_message gets StepOutputs and ControlReply; on_down is called at once when the process is gone, with the reason. Both
    are set by whoever owns the requests (`AsyncEngine`).
    """

    def __init__(
        self,
        config: BrimConfig,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        policy: RestartPolicy | None = None,
        silence: SilenceLimits | None = None,
        launched: LaunchedProcess | None = None,
    ) -> None:
        """launched: taken over for the first life; who launched it closes it."""
        self.on_message: Callable[[FromEngine], None] = _ignore
        self.on_down: Callable[[EngineDead], None] = _ignore
        self.state: State = "starting"
        self.reason = "The engine is starting."
        self.info: dict[str, Any] = {}
        self.num_restarts = 0
        self._config = config
        self._command = tuple(command)
        self._launched = launched
        self._policy = policy or RestartPolicy()
        self._silence = silence or SilenceLimits()
        self._watch = StartWatch()
        self._avoided: tuple[Avoided, ...] = ()
        self._was_heard = False
        self._on_progress: Callable[[StartupProgress], None] = _ignore
        self._process: EngineProcess | None = None
        self._task: asyncio.Task[None] | None = None
        self._started: asyncio.Future[dict[str, Any]] | None = None
        self._ready_s = 0.0

    @property
    def pid(self) -> int | None:
        """Of the engine process; None while there is none."""
        return self._process.pid if self._process is not None else None

    @property
    def start_phases(self) -> Sequence[PhaseSoFar]:
        """Of the last start, so far."""
        return self._watch.phases

    @property
    def _is_stopped(self) -> bool:
        return self.state == "stopped"

    async def start(self, on_progress: Callable[[StartupProgress], None] | None = None) -> dict[str, Any]:
        """Start the engine and wait until it serves; what it says of itself. Raises the BrimError that stopped it."""
        self._on_progress = on_progress or _ignore
        self._started = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._supervise(self._started))
        return await asyncio.shield(self._started)

    def send(self, message: ToEngine) -> None:
        """To the engine. Raises EngineDead, with the reason, while it does not serve."""
        if self.state != "ready" or self._process is None:
            raise EngineDead(self.reason)
        self._process.send(message)

    async def close(self, grace_s: float = 5.0) -> None:
        """Stop the engine. Nothing is restarted any more."""
        was_ready = self.state == "ready"
        self.state, self.reason = "stopped", "The server is shutting down."
        process = self._process
        if process is not None and was_ready:
            process.send(ControlCall(0, "shutdown"))
        if process is not None and was_ready and self._task is not None:
            await asyncio.wait({self._task}, timeout=grace_s)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._started is not None and self._started.done() and not self._started.cancelled():
            self._started.exception()  # looked at: whoever waited may be gone

    async def _supervise(self, started: asyncio.Future[dict[str, Any]]) -> None:
        num_failures = 0
        while not self._is_stopped:
            how, process = await self._one_life(started)
            if self._is_stopped:
                break
            served = self.state == "ready"
            avoided = None if served or process is None else self._blame(process)
            if avoided is not None and not self._config.device.strict:
                self._avoided = merge(self._avoided, (avoided,))
                print(f"brim: {said_of_death(avoided)}", file=sys.stderr, flush=True)
                self.num_restarts += 1
                continue
            if not started.done():
                failure = process.failure if process is not None else None
                started.set_exception(_start_error(failure, how, self._watch.phase, avoided))
                self.state, self.reason = "stopped", f"The engine could not start: {how}"
                return
            stable = served and time.monotonic() - self._ready_s > self._policy.stable_s
            num_failures = 1 if stable else num_failures + 1
            pause_s = self._policy.pause_s(num_failures)
            self._go_down(how, pause_s, served)
            await asyncio.sleep(pause_s)
            self.num_restarts += 1
        if not started.done():
            started.set_exception(EngineDead(self.reason))

    async def _one_life(self, started: asyncio.Future[dict[str, Any]]) -> tuple[str, EngineProcess | None]:
        """From a process's start to its end: how it ended, a clause; None where there was none."""
        process = None
        self._watch, self._was_heard = StartWatch(), False
        try:
            launched, self._launched = self._launched, None
            process = await EngineProcess.spawn(self._command, apply_avoided(self._config, self._avoided), launched)
            how = await self._live(process, started)
        except BrimError as error:
            how = str(error)
        except msgspec.MsgspecError as error:
            how = f"it sent what cannot be read: {error}"
        finally:
            self._process = None
            if process is not None:
                for progress in process.told():
                    self._watch.note(progress)
                await process.close(0)
        return how, process

    def _blame(self, process: EngineProcess) -> Avoided | None:
        """What to do without after a start that died; None where it said why it cannot start, or nothing is left."""
        if process.failure is not None and process.failure.kind not in _DEATHS:
            return None
        return self._watch.blame(process.how) if process.how else None

    async def _live(self, process: EngineProcess, started: asyncio.Future[dict[str, Any]]) -> str:
        self._process = process

        def take(message: FromEngine) -> None:
            self._was_heard = True
            if isinstance(message, EngineReady):
                if self._is_stopped:
                    return
                self._become_ready(message)
                if not started.done():
                    started.set_result(message.info)
                else:
                    print("brim: the engine is back.", file=sys.stderr, flush=True)
            elif isinstance(message, StartupProgress):
                self._watch.note(message)
                self._on_progress(message)
            elif not (isinstance(message, ControlReply) and message.call_id == _PING_ID):
                self.on_message(message)

        listening = asyncio.create_task(self._listen_for_life(process))
        try:
            return await process.run(take)
        finally:
            listening.cancel()
            await asyncio.wait({listening})

    def _become_ready(self, message: EngineReady) -> None:
        self._watch.note_ready()
        self.info, self.state, self.reason = message.info, "ready", ""
        self._ready_s = time.monotonic()
        if self._avoided and self._watch.identity:
            write_record(self._watch.identity, self._avoided)

    async def _listen_for_life(self, process: EngineProcess) -> None:
        """Kill a process that is silent for too long. Silence is counted in checks: time in which this process itself was
        stopped, or did not come to listen, is not held against the engine."""
        silent_s = 0.0
        while True:
            limit_s = self._silence_limit_s()
            pause_s = min(_LONGEST_CHECK_S, max(_SHORTEST_CHECK_S, (limit_s or math.inf) / _CHECKS))
            if limit_s is not None and self.state == "ready" and (self._was_heard or not silent_s):
                process.send(ControlCall(_PING_ID, "ping"))
            self._was_heard = False
            await asyncio.sleep(pause_s)
            silent_s = 0.0 if self._was_heard else silent_s + pause_s
            if limit_s is not None and silent_s >= limit_s:
                process.kill(f"it gave no sign of life for {silent_s:.3g} s")
                return

    def _silence_limit_s(self) -> float | None:
        if self.state == "ready":
            return self._watch.step_limit_s(self._config.server.step_timeout_seconds)
        return self._silence.of_start(self._watch.phase)

    def _go_down(self, how: str, pause_s: float, served: bool) -> None:
        how = how.rstrip(".")
        self.state = "down"
        self.reason = f"The engine is being restarted; try again shortly. It stopped: {how}."
        print(f"brim: the engine process stopped: {how}. Restarting in {pause_s:g} s.", file=sys.stderr, flush=True)
        if served:
            self.on_down(EngineDead(f"The engine process died while it served this request: {how}."))


def named_error(failure: EngineFailed) -> BrimError:
    """The BrimError that an engine process reported."""
    kind = getattr(errors, failure.kind, None)
    if not isinstance(kind, type) or not issubclass(kind, BrimError):
        return EngineError(failure.message)
    if issubclass(kind, (MemoryBudgetError, OutOfDeviceMemory)):
        return kind(failure.message, ledger=failure.ledger, nearest=failure.nearest)
    return kind(failure.message)


def _start_error(failure: EngineFailed | None, how: str, phase: str, avoided: Avoided | None) -> BrimError:
    """What stopped the first start: what the engine said, or that it said nothing. avoided: what --strict will not do without."""
    if avoided is not None:
        return EngineError(
            f"{avoided.reason[:1].upper()}{avoided.reason[1:]}, and --strict refuses to start {without(avoided)}; start with "
            f"{flag_for(avoided)}, or drop --strict."
        )
    if failure is not None:
        return named_error(failure)
    doing = f" while {DOING[phase]}" if phase in DOING else ""
    return EngineError(f"The engine process could not start: {how}{doing}. Its own output says more.")


def _ignore(_: object) -> None:
    """For what nobody asked to know."""
