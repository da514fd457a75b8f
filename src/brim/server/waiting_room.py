"""What clients hear while the engine starts: a 503 that says so. Owns the listener until the app takes it over.

The port listens from the first moment, so that a second server on it is refused before it loads a model, and a client is
told to wait instead of being turned away.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from types import TracebackType

from brim.server.api_errors import ApiError

_TIMEOUT_S = 5.0
_MOST_HEADER_BYTES = 1 << 16


class WaitingRoom:
    """An async context: open inside, closed after. The listener itself stays open, and who comes in between waits in it."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> WaitingRoom:
        self._server = await asyncio.start_server(_answer, sock=self._listener.dup(), limit=_MOST_HEADER_BYTES)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._server is not None:
            self._server.close()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One request, whatever it is. What else the client sends is read, or it would not see the answer."""
    try:
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(_TIMEOUT_S):
                await reader.readuntil(b"\r\n\r\n")
                writer.write(_starting())
                writer.write_eof()
                while await reader.read(_MOST_HEADER_BYTES):
                    pass
    finally:
        writer.close()


def _starting() -> bytes:
    error = ApiError(
        503, "The engine is starting; try again shortly.", kind="service_unavailable", code="engine_unavailable"
    ).response()
    headers = b"".join(b"%s: %s\r\n" % header for header in error.raw_headers)
    return b"HTTP/1.1 503 Service Unavailable\r\n" + headers + b"connection: close\r\n\r\n" + bytes(error.body)
