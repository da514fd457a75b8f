"""One life of the engine process, seen from its parent: its start, its words, its end. Owns the process and its socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from brim.config.schema import BrimConfig
from brim.engine.engine_process import EngineLaunch
from brim.engine.launched_process import LaunchedProcess
from brim.engine.messages import EngineFailed, FromEngine, StartupProgress, ToEngine
from brim.engine.transport import FrontChannel
from brim.errors import EngineError

_LAST_WORDS_S = 0.1
_LAST_BREATH_S = 10.0  # to end in, for a process that said it failed: a lost device may hold it in its driver


class EngineProcess:
    """One life. failure: what it said of its end itself; how, after `run`: its end in a few words (`SIGABRT`, `status 7`)."""

    def __init__(self, launched: LaunchedProcess, channel: FrontChannel) -> None:
        self._launched = launched
        self._channel = channel
        self._end = _End(launched.process)
        self.failure: EngineFailed | None = None
        self.how = ""
        self._why_killed = ""
        self._last_breath: asyncio.TimerHandle | None = None

    @classmethod
    async def spawn(cls, command: Sequence[str], config: BrimConfig, launched: LaunchedProcess | None = None) -> EngineProcess:
        """Start it, or take over one that was `launched` earlier; its settings go over stdin, without the server's keys."""
        channel = FrontChannel()
        try:
            launched = launched or LaunchedProcess(command)
        except EngineError:
            channel.close()
            raise
        child = cls(launched, channel)
        private = replace(config, server=replace(config.server, api_keys=()))
        launch = EngineLaunch(channel.address, os.getpid(), private, channel.server_key, launched.writing_fd)
        try:
            await asyncio.to_thread(launched.tell, msgspec.json.encode(launch) + b"\n")
        except BaseException:
            await child.close(0)
            raise
        return child

    @property
    def pid(self) -> int:
        """Of the process, for tests and people."""
        return self._launched.process.pid

    def send(self, message: ToEngine) -> None:
        """Queue a message; never blocks."""
        self._channel.send(message)

    async def run(self, on_message: Callable[[FromEngine], None]) -> str:
        """Give every message to `on_message` until the process ends; returns how it ended, a clause."""
        reading = asyncio.create_task(self._read(on_message))
        ending = asyncio.create_task(self._end.wait())
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
        if self._last_breath is not None:
            self._last_breath.cancel()
        return self._said_of(status)

    def _said_of(self, status: int) -> str:
        if self.failure is not None:
            self.how = self.failure.message.rstrip(".")
            return self.failure.message
        if self._why_killed:
            self.how = self._why_killed
            return f"{self._why_killed}, and was killed"
        if status < 0:
            self.how = _signal_name(-status)
            return f"it was killed by signal {-status}"
        self.how = f"status {status}"
        return f"it ended with status {status}"

    async def _read(self, on_message: Callable[[FromEngine], None]) -> None:
        while True:
            self._note(await self._channel.receive(), on_message)

    def _note(self, message: FromEngine, on_message: Callable[[FromEngine], None]) -> None:
        if isinstance(message, EngineFailed):
            self.failure = message
            self._last_breath = asyncio.get_running_loop().call_later(_LAST_BREATH_S, self.kill)
        else:
            on_message(message)

    def told(self) -> list[StartupProgress]:
        """Its start, phase by phase, to the very last: a pipe keeps what a dying process leaves unsent. Given once."""
        told = b""
        with contextlib.suppress(BlockingIOError):
            while more := os.read(self._launched.progress_fd, 1 << 16):
                told += more
        return [
            msgspec.json.decode(line, type=StartupProgress) for line in told.splitlines(keepends=True) if line.endswith(b"\n")
        ]

    def kill(self, why: str = "") -> None:
        """End it now, and whatever it started. why: a clause, `it gave no sign of life for 60 s`."""
        self._why_killed = self._why_killed or why
        self._launched.kill()

    async def close(self, grace_s: float) -> None:
        """End it and what it started, kindly for at most `grace_s`, and free the socket."""
        if grace_s:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._end.wait(), grace_s)
        if self._last_breath is not None:
            self._last_breath.cancel()
        self.kill()
        await self._end.wait()
        self._launched.close()
        self._channel.close()


class _End:
    """The end of a process, awaited by any number of tasks of this event loop; a thread waits for it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._came = asyncio.Event()
        threading.Thread(target=self._watch, name="brim-engine-end", daemon=True).start()

    def _watch(self) -> None:
        self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._came.set)

    async def wait(self) -> int:
        """Its exit status; minus the number of the signal that killed it."""
        await self._came.wait()
        return self._process.wait()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
