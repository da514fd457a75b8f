"""A server's life: the port, the engine, the app, and a kind end. Owns the order of these and the signals.

    port taken: 503 -> engine and text side start, beside each other -> serving -> SIGTERM or Ctrl-C: draining -> exit 0

A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import uvicorn
from starlette.types import ASGIApp

from brim.config.schema import BrimConfig, ServerConfig
from brim.engine.async_engine import AsyncEngine
from brim.engine.launched_process import ENGINE_COMMAND, LaunchedProcess
from brim.engine.messages import StartupProgress
from brim.engine.supervisor import Supervisor
from brim.errors import ConfigError
from brim.front import open_front
from brim.server.app import create_app
from brim.server.gate import KeyGate
from brim.server.instances import InstanceFile
from brim.server.live import LiveServer
from brim.server.seams import ServerFront
from brim.server.waiting_room import Door, WaitingRoom

T = TypeVar("T")
OpenFront = Callable[[BrimConfig], ServerFront]
OnProgress = Callable[[StartupProgress], None]
OnReady = Callable[[Mapping[str, Any]], None]
_BACKLOG = 2048
_CLOSING_S = 5  # for answers on their way when all generations have ended
_HURRIED_S = 1  # after a second signal


def run_server(
    config: BrimConfig,
    *,
    open_front: OpenFront = open_front,
    on_progress: OnProgress | None = None,
    on_ready: OnReady | None = None,
    command: Sequence[str] = ENGINE_COMMAND,
    launched: LaunchedProcess | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError for an address that cannot be used, and what start-up raises.

    open_front: the model's text side, opened in a thread. on_ready gets what the engine says of itself.
    command: of the engine process. launched: the first one, where it was started ahead; who did closes it.
    """
    listener = listen(config.server)
    with contextlib.closing(listener):
        asyncio.run(HttpServer(config, open_front, listener, command, launched).run(on_progress, on_ready))


def listen(config: ServerConfig) -> socket.socket:
    """The socket to serve on, taken for good: clients that connect wait until they are accepted. Raises ConfigError."""
    try:
        addresses = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"--host {config.host} is no address of this machine: {error.strerror}.") from error
    family, kind, protocol, _, address = addresses[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)  # two that are only bound may share a port, and one would fail when its engine is up
        listener.set_inheritable(False)
    except OSError as error:
        listener.close()
        if isinstance(error, PermissionError):
            raise ConfigError(
                f"Port {config.port} may not be used by this user; give one of 1024 or more with --port."
            ) from error
        where = f"{config.host}:{config.port}"
        hint = "another program has it; give another with --port, or --port 0 for any free one"
        if error.errno != errno.EADDRINUSE:
            hint = f"{error.strerror}; give another with --host"
        raise ConfigError(f"Cannot serve on {where}: {hint}.") from error
    return listener


def url_of(host: str, listener: socket.socket) -> str:
    """What clients use. An address that means all of them is shown as this machine's own."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    port = listener.getsockname()[1]
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


class HttpServer:
    """One server on one listener, for one event loop."""

    def __init__(
        self,
        config: BrimConfig,
        open_front: OpenFront,
        listener: socket.socket,
        command: Sequence[str] = ENGINE_COMMAND,
        launched: LaunchedProcess | None = None,
    ) -> None:
        self._config = config
        self._open_front = open_front
        self._listener = listener
        self._supervisor = Supervisor(config, command=command, launched=launched)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._url = url_of(config.server.host, listener)

    async def run(self, on_progress: OnProgress | None = None, on_ready: OnReady | None = None) -> None:
        """From start to end."""
        names = self._config.model.served_model_name
        file = InstanceFile.open(names[0] if names else self._config.model.model, self._url)
        keys = [file.instance.key] if file is not None else []
        door = Door(self._waiting_room(keys))
        http = _Uvicorn(_settings(door))
        with self._signals():
            serving = asyncio.create_task(http.serve(sockets=[self._listener]))
            try:
                engine, front = await self._until_stopped(self._start(on_progress))
                if on_ready is not None:
                    on_ready(engine.info)
                _settle()
                door.app = create_app(engine, front, self._config, extra_keys=keys)
                await self._serve(engine, front, file, http, serving)
            except _Stopped:
                print("brim: stopped while starting.", file=sys.stderr, flush=True)
            finally:
                await self._hang_up(http, serving)
                await self._supervisor.close()
                if file is not None:
                    file.close()
        serving.result()

    def _waiting_room(self, keys: Sequence[str]) -> ASGIApp:
        room = WaitingRoom(LiveServer.of_config(self._config), lambda: self._supervisor.start_phases)
        own = self._config.server.api_keys
        return KeyGate(room, [*own, *keys]) if own else room

    async def _start(self, on_progress: OnProgress | None) -> tuple[AsyncEngine, ServerFront]:
        starting = asyncio.create_task(self._supervisor.start(on_progress))
        try:
            front = await asyncio.to_thread(self._open_front, self._config)
            engine = AsyncEngine(self._supervisor, front.text_tools)
            await starting
        finally:
            starting.cancel()
            await asyncio.wait({starting})
        return engine, front

    async def _until_stopped(self, start: Coroutine[Any, Any, T]) -> T:
        starting, stopping = asyncio.create_task(start), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                raise _Stopped
            return starting.result()
        finally:
            stopping.cancel()
            starting.cancel()
            await asyncio.wait({starting, stopping})

    async def _serve(
        self, engine: AsyncEngine, front: ServerFront, file: InstanceFile | None, http: _Uvicorn, serving: asyncio.Task[None]
    ) -> None:
        if file is not None:
            file.set_state("serving")
        print(f"brim: serving {front.model_names[0]} at {self._url}/v1", file=sys.stderr, flush=True)
        print(f"brim: the memory page is {self._url}/", file=sys.stderr, flush=True)
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                await self._drain(engine, file)
        finally:
            stopping.cancel()
            await asyncio.wait({stopping})
            await self._hang_up(http, serving)
            await engine.close()

    async def _hang_up(self, http: _Uvicorn, serving: asyncio.Task[None]) -> None:
        http.should_exit = True
        if self._hurry.is_set():  # uvicorn's force_exit waits for all clients from Python 3.12 on
            http.config.timeout_graceful_shutdown = _HURRIED_S
        await asyncio.wait({serving})

    async def _drain(self, engine: AsyncEngine, file: InstanceFile | None) -> None:
        if file is not None:
            file.set_state("stopping")
        seconds, count = self._config.server.drain_seconds, engine.num_requests
        if count:
            some = "1 request" if count == 1 else f"{count} requests"
            print(f"brim: stopping; {some} may take {seconds} s to finish; once more stops at once.", file=sys.stderr, flush=True)
        draining, hurrying = asyncio.create_task(engine.drain(seconds)), asyncio.create_task(self._hurry.wait())
        await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
        hurrying.cancel()
        await asyncio.wait({draining, hurrying})
        if self._hurry.is_set():
            await engine.drain(0)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop, numbers = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()


def _settle() -> None:
    """What a start leaves stays, a large vocabulary above all: collections while serving, which stop every stream, skip it."""
    gc.collect()
    gc.freeze()


class _Stopped(Exception):
    """A signal came before the server served."""


def _settings(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app, lifespan="off", ws="none", log_config=None, access_log=False, log_level="warning", server_header=False,
        backlog=_BACKLOG, timeout_graceful_shutdown=_CLOSING_S,
    )  # fmt: skip


class _Uvicorn(uvicorn.Server):
    """Signals are HttpServer's, which drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take none."""
        yield
