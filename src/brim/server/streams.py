"""What any streamed or collected generation needs of asyncio. Owns merging, noticing that the client left, and event streams."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from brim.server.api_errors import as_api_error

T = TypeVar("T")
DONE_FRAME = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def merge(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    """Items of several streams as they come. Closing it closes them all.

    An exception of one stream ends the whole.
    """
    queue: asyncio.Queue[tuple[T] | BaseException | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(stream, queue)) for stream in streams]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item[0]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(stream: AsyncGenerator[T], queue: asyncio.Queue[tuple[T] | BaseException | None]) -> None:
    try:
        async with contextlib.aclosing(stream):
            async for item in stream:
                queue.put_nowait((item,))
    except Exception as error:
        queue.put_nowait(error)
    else:
        queue.put_nowait(None)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; it is cancelled, and ClientGone raised, when the client leaves first."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.wait({working, watching})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """An ASGI answer of server-sent events. An exception on the way is an event with an error object, then the end."""

    def __init__(self, frames: AsyncGenerator[bytes]) -> None:
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the frames as they come until they end or the client leaves."""
        with contextlib.suppress(ClientGone):
            await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        async with contextlib.aclosing(self._frames) as frames:
            async for frame in frames:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def frame_of(data: bytes) -> bytes:
    """One event."""
    return b"data: " + data + b"\n\n"


def error_body(error: Exception) -> dict[str, Any]:
    """What an event says when the generation failed under way."""
    return as_api_error(error).body
