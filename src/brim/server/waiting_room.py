"""What clients hear while the engine starts: a 503 that says so, and the memory page with the start's phases. Owns that app.

The port is served from the first moment, so that a second server on it is refused before it loads a model, and a client is
told to wait instead of being turned away. A `Door` stands before both apps and is opened once there is an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastapi import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from brim.engine.start_watch import PhaseSoFar
from brim.server.api_errors import ApiError
from brim.server.live import LIVE_PATH, LiveServer, live_response
from brim.server.memory_page import PAGE_PATH, MemoryPage

_REASON = "The engine is starting; try again shortly."


class Door:
    """The app in front: passes everything to `app`, which may be replaced while the port is served."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        await self.app(scope, receive, send)


class WaitingRoom:
    """The app of a server whose engine starts for the first time. phases: of that start, so far."""

    def __init__(self, server: LiveServer, phases: Callable[[], Sequence[PhaseSoFar]]) -> None:
        self._server = server
        self._phases = phases
        self._page = MemoryPage()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http":
            await self._answer(scope["method"], scope["path"])(scope, receive, send)

    def _answer(self, method: str, path: str) -> Response:
        if method == "GET" and path == PAGE_PATH:
            return self._page.response()
        if method == "GET" and path == LIVE_PATH:
            return live_response(self._server.starting(_REASON, self._phases()))
        return ApiError(503, _REASON, kind="service_unavailable", code="engine_unavailable").response()
