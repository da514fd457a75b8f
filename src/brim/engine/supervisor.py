"""Keeps an engine process alive beside a front end. Owns its start, its end, and bringing it back; not the requests.

    starting -> ready -> down -> starting ... -> stopped

The first start may fail for good (its BrimError is raised); later ones are tried again and again, with growing pauses.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

import brim.errors as errors
from brim.config.schema import BrimConfig
from brim.engine.engine_process import EngineLaunch
from brim.engine.messages import ControlCall, EngineFailed, EngineReady, FromEngine, StartupProgress, ToEngine
from brim.engine.transport import FrontChannel
from brim.errors import BrimError, EngineDead, EngineError, MemoryBudgetError, OutOfDeviceMemory

ENGINE_COMMAND = (sys.executable, "-m", "brim.engine_main")
State = Literal["starting", "ready", "down", "stopped"]
_LAST_WORDS_S = 0.1
_STDERR = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """Pauses before a restart: first_pause_s, doubled with each failure up to most_pause_s; new after stable_s of service."""

    first_pause_s: float = 0.25
    most_pause_s: float = 30.0
    stable_s: float = 60.0

    def pause_s(self, num_failures: int) -> float:
        """`RestartPolicy().pause_s(3) == 1.0`."""
        return min(self.most_pause_s, self.first_pause_s * float(1 << min(num_failures - 1, 30)))


class EngineProcess:
    """One life of the engine process."""

    def __init__(self, process: asyncio.subprocess.Process, channel: FrontChannel) -> None:
        self._process = process
        self._channel = channel
        self.failure: EngineFailed | None = None

    @classmethod
    async def spawn(cls, command: Sequence[str], config: BrimConfig) -> EngineProcess:
        """Start it; its settings go over stdin, without the server's keys. Its output goes to stderr."""
        channel = FrontChannel()
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=subprocess.PIPE, stdout=_STDERR, start_new_session=True
            )
        except OSError as error:
            channel.close()
            raise EngineError(f"The engine process could not be started: {error}.") from error
        private = replace(config, server=replace(config.server, api_keys=()))
        assert process.stdin is not None, "its stdin is a pipe"
        launch = EngineLaunch(channel.address, os.getpid(), private, channel.server_key)
        process.stdin.write(msgspec.json.encode(launch) + b"\n")
        with contextlib.suppress(ConnectionError):
            await process.stdin.drain()
        return cls(process, channel)

    @property
    def pid(self) -> int:
        """Of the process, for tests and people."""
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Queue a message; never blocks."""
        self._channel.send(message)

    async def run(self, on_message: Callable[[FromEngine], None]) -> str:
        """Give every message to `on_message` until the process ends; returns how it ended, a clause."""
        reading = asyncio.create_task(self._read(on_message))
        ending = asyncio.create_task(self._process.wait())
        try:
            await asyncio.wait({reading, ending}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():  # a message that cannot be read, or a bug of ours: this process is of no more use
                self.kill()
                reading.result()
            status = await ending
        finally:
            reading.cancel()
            ending.cancel()
            await asyncio.wait({reading, ending})
        for message in await self._channel.receive_rest(_LAST_WORDS_S):
            self._note(message, on_message)
        if self.failure is not None:
            return self.failure.message
        return f"it was killed by signal {-status}" if status < 0 else f"it ended with status {status}"

    async def _read(self, on_message: Callable[[FromEngine], None]) -> None:
        while True:
            self._note(await self._channel.receive(), on_message)

    def _note(self, message: FromEngine, on_message: Callable[[FromEngine], None]) -> None:
        if isinstance(message, EngineFailed):
            self.failure = message
        else:
            on_message(message)

    def kill(self) -> None:
        """End it now."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def close(self, grace_s: float) -> None:
        """End it, kindly for at most `grace_s`, and free the socket."""
        if grace_s and self._process.returncode is None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace_s)
        self.kill()
        await self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._channel.close()


class Supervisor:
    """Starts an engine process, tells what it says, notices its end and starts it again.

    on_message gets StepOutputs and ControlReply; on_down is called at once when the process is gone, with the reason. Both
    are set by whoever owns the requests (`AsyncEngine`).
    """

    def __init__(
        self, config: BrimConfig, *, command: Sequence[str] = ENGINE_COMMAND, policy: RestartPolicy | None = None
    ) -> None:
        self.on_message: Callable[[FromEngine], None] = _ignore
        self.on_down: Callable[[EngineDead], None] = _ignore
        self.state: State = "starting"
        self.reason = "The engine is starting."
        self.info: dict[str, Any] = {}
        self.num_restarts = 0
        self._config = config
        self._command = tuple(command)
        self._policy = policy or RestartPolicy()
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
            process = None
            try:
                process = await EngineProcess.spawn(self._command, self._config)
                how = await self._live(process, started)
            except BrimError as error:
                how = str(error)
            except msgspec.MsgspecError as error:
                how = f"it sent what cannot be read: {error}"
            finally:
                self._process = None
                if process is not None:
                    await process.close(0)
            if self._is_stopped:
                break
            if not started.done():
                started.set_exception(_start_error(process.failure if process is not None else None, how))
                self.state, self.reason = "stopped", f"The engine could not start: {how}"
                return
            served = self.state == "ready"
            stable = served and time.monotonic() - self._ready_s > self._policy.stable_s
            num_failures = 1 if stable else num_failures + 1
            pause_s = self._policy.pause_s(num_failures)
            self._go_down(how, pause_s, served)
            await asyncio.sleep(pause_s)
            self.num_restarts += 1
        if not started.done():
            started.set_exception(EngineDead(self.reason))

    async def _live(self, process: EngineProcess, started: asyncio.Future[dict[str, Any]]) -> str:
        self._process = process

        def take(message: FromEngine) -> None:
            if isinstance(message, EngineReady):
                if self._is_stopped:
                    return
                self.info, self.state, self.reason = message.info, "ready", ""
                self._ready_s = time.monotonic()
                if not started.done():
                    started.set_result(message.info)
                else:
                    print("brim: the engine is back.", file=sys.stderr, flush=True)
            elif isinstance(message, StartupProgress):
                self._on_progress(message)
            else:
                self.on_message(message)

        return await process.run(take)

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


def _start_error(failure: EngineFailed | None, how: str) -> BrimError:
    """What stopped the first start: what the engine said, or that it said nothing."""
    if failure is not None:
        return named_error(failure)
    return EngineError(f"The engine process could not start: {how}. Its own output says more.")


def _ignore(_: object) -> None:
    """For what nobody asked to know."""
