"""One life of the engine process, seen from its parent: its start, its words, its end. Owns the process and its socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from brim.config.schema import BrimConfig
from brim.engine.engine_process import EngineLaunch
from brim.engine.messages import EngineFailed, FromEngine, StartupProgress, ToEngine
from brim.engine.transport import FrontChannel
from brim.errors import EngineError

_LAST_WORDS_S = 0.1
_LAST_BREATH_S = 10.0  # to end in, for a process that said it failed: a lost device may hold it in its driver
_STDERR = 2


class EngineProcess:
    """One life. failure: what it said of its end itself; how, after `run`: its end in a few words (`SIGABRT`, `status 7`)."""

    def __init__(self, process: asyncio.subprocess.Process, channel: FrontChannel, progress_fd: int) -> None:
        self._process = process
        self._channel = channel
        self._progress_fd = progress_fd
        self.failure: EngineFailed | None = None
        self.how = ""
        self._why_killed = ""
        self._last_breath: asyncio.TimerHandle | None = None

    @classmethod
    async def spawn(cls, command: Sequence[str], config: BrimConfig) -> EngineProcess:
        """Start it; its settings go over stdin, without the server's keys. Its output goes to stderr."""
        channel = FrontChannel()
        reading_fd, writing_fd = os.pipe()
        os.set_blocking(reading_fd, False)
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=subprocess.PIPE, stdout=_STDERR, start_new_session=True, pass_fds=(writing_fd,)
            )
        except BaseException as error:
            channel.close()
            os.close(reading_fd)
            if isinstance(error, OSError):
                raise EngineError(f"The engine process could not be started: {error}.") from error
            raise
        finally:
            os.close(writing_fd)
        child = cls(process, channel, reading_fd)
        private = replace(config, server=replace(config.server, api_keys=()))
        assert process.stdin is not None, "its stdin is a pipe"
        launch = EngineLaunch(channel.address, os.getpid(), private, channel.server_key, writing_fd)
        process.stdin.write(msgspec.json.encode(launch) + b"\n")
        try:
            with contextlib.suppress(ConnectionError):
                await process.stdin.drain()
        except BaseException:
            await child.close(0)
            raise
        return child

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
        if self._last_breath is not None:
            self._last_breath.cancel()
        return self._end(status)

    def _end(self, status: int) -> str:
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
            while more := os.read(self._progress_fd, 1 << 16):
                told += more
        return [
            msgspec.json.decode(line, type=StartupProgress) for line in told.splitlines(keepends=True) if line.endswith(b"\n")
        ]

    def kill(self, why: str = "") -> None:
        """End it now, and whatever it started. why: a clause, `it gave no sign of life for 60 s`."""
        self._why_killed = self._why_killed or why
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its own session, so its own group

    async def close(self, grace_s: float) -> None:
        """End it and what it started, kindly for at most `grace_s`, and free the socket."""
        if grace_s and self._process.returncode is None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace_s)
        if self._last_breath is not None:
            self._last_breath.cancel()
        self.kill()
        await self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        os.close(self._progress_fd)
        self._channel.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
