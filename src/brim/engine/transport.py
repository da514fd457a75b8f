"""The socket between a front end and its engine process: ZeroMQ over a local ipc socket, messages in msgpack, no pickle.

Where an ipc socket cannot be had (the system has none, or the path of its folder is too long) it is a loopback port instead,
encrypted (CURVE) with a key pair of its own: only who was told `server_key` gets in.

Owns addresses, keys, sockets and the bytes on them; not the processes, and not what the messages mean.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zmq
import zmq.asyncio

from brim.engine.messages import FromEngine, ToEngine
from brim.errors import EngineError

_LINGER_MS = 2000  # how long the last words of a closing side may take


class EngineChannel(Protocol):
    """The engine's side. Tests use a list-backed one."""

    def receive(self, *, wait_s: float) -> list[ToEngine]:
        """All messages that have arrived; for the first it waits so long."""

    def send(self, message: FromEngine) -> None:
        """Queue a message; never blocks."""

    def close(self) -> None:
        """Send what is queued, then close."""


class ZmqEngineChannel:
    """EngineChannel over the address that the front end bound; server_key: what it says there, empty for ipc."""

    def __init__(self, address: str, server_key: str = "") -> None:
        self._context = zmq.Context()
        self._socket = _unbounded(self._context.socket(zmq.PAIR))
        if server_key:
            self._socket.curve_publickey, self._socket.curve_secretkey = zmq.curve_keypair()
            self._socket.curve_serverkey = server_key.encode()
        self._socket.connect(address)
        self._encode = msgspec.msgpack.Encoder(enc_hook=_plain).encode
        self._decoder = msgspec.msgpack.Decoder(ToEngine)

    def receive(self, *, wait_s: float) -> list[ToEngine]:
        """See EngineChannel."""
        if wait_s and not self._socket.poll(int(wait_s * 1000)):
            return []
        return list(self._arrived())

    def _arrived(self) -> Iterator[ToEngine]:
        try:
            while True:
                yield self._decoder.decode(self._socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return

    def send(self, message: FromEngine) -> None:
        """See EngineChannel."""
        self._socket.send(self._encode(message))

    def close(self, linger_ms: int = _LINGER_MS) -> None:
        """See EngineChannel. linger_ms: how long what is queued may take."""
        self._socket.close(linger_ms)
        self._context.term()


class FrontChannel:
    """The front end's side, for one engine process and one event loop: binds in a private folder, which `close` removes.

    address and server_key are for the engine process; the key is a secret.
    """

    def __init__(self, *, use_ipc: bool = True) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="brim-"))  # mode 0700
        self.server_key = ""
        self._context = zmq.asyncio.Context()
        self._socket = _unbounded(self._context.socket(zmq.PAIR))
        self._encode = msgspec.msgpack.Encoder().encode
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        try:
            self.address = (self._bind_ipc() if use_ipc else "") or self._bind_loopback()
        except (zmq.ZMQError, zmq.ZMQVersionError) as error:
            self.close()
            raise EngineError(
                f"Cannot open the engine's socket, neither in {self._folder} nor on a loopback port: {error}. Set TMPDIR to a "
                "folder with a short path."
            ) from error

    def _bind_ipc(self) -> str:
        """The address; empty where there is no ipc here."""
        address = f"ipc://{self._folder}/engine"
        try:
            self._socket.bind(address)
        except zmq.ZMQError:
            return ""
        return address

    def _bind_loopback(self) -> str:
        public, secret = zmq.curve_keypair()
        self._socket.curve_publickey, self._socket.curve_secretkey = public, secret
        self._socket.curve_server = True
        self.server_key = public.decode()
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        return f"tcp://127.0.0.1:{port}"

    async def receive(self) -> FromEngine:
        """The next message."""
        return self._decode(await self._socket.recv())

    async def receive_rest(self, timeout_s: float) -> list[FromEngine]:
        """What is still on its way from a process that has ended."""
        rest = []
        while await self._socket.poll(int(timeout_s * 1000)):
            rest.append(self._decode(await self._socket.recv()))
        return rest

    def send(self, message: ToEngine) -> None:
        """Queue a message; never blocks."""
        self._socket.send(self._encode(message))

    def close(self) -> None:
        """Close the socket and remove its folder."""
        self._socket.close(0)
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _decode(self, frame: bytes) -> FromEngine:
        message: FromEngine = self._decoder.decode(frame)
        return message


def _unbounded(socket: Any) -> Any:
    """Neither side may ever block on the other, which computes or serves meanwhile."""
    socket.set_hwm(0)
    return socket


def _plain(value: Any) -> Any:
    """A numpy number in a report as a plain one."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be sent")
