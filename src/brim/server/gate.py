"""What stands before the app: API keys, and one log line a request. Owns both; plain ASGI, so that nothing is buffered."""

from __future__ import annotations

import hashlib
import hmac
import sys
import time
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from brim.server.api_errors import ApiError

_OPEN_PATHS = frozenset({"/health", "/"})  # the memory page itself holds no figures; what it asks for wants the key


class KeyGate:
    """Lets requests with one of the keys through. Keys are compared by their digests, in constant time, all of them."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 401 where the key is missing or wrong."""
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not self._is_known(given):
                hint = "That API key is not known here." if given else "This server wants an API key."
                message = f"{hint} Send it as 'Authorization: Bearer KEY'."
                error = ApiError(401, message, kind="authentication_error", code="invalid_api_key")
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_known(self, given: bytes) -> bool:
        scheme, _, key = given.partition(b" ")
        digest = _digest(key.strip())
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(found)


class RequestLog:
    """One line a request on stderr when it has been answered: method, path, status, seconds. Never what was said."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s, status = time.perf_counter(), 0

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        finally:
            seconds = time.perf_counter() - started_s
            print(f"brim: {scope['method']} {scope['path']!r} {status} {seconds:.3f} s", file=sys.stderr, flush=True)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
