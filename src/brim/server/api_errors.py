"""Every error as OpenAI's clients know it: {"error": {"message", "type", "param", "code"}} and a status. Owns that mapping."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import Request, Response
from starlette.exceptions import HTTPException

import brim.errors as errors
from brim.errors import BrimError, EngineError, OutOfDeviceMemory, PromptTooLong, RequestError, RequestFailed

JSON = "application/json"
CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
_RETRY_AFTER_S = "1"


class ApiError(Exception):
    """An answer that is an error, complete."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """As an HTTP answer; a 503 says when to come back, a 401 how to say who one is."""
        headers = {503: {"Retry-After": _RETRY_AFTER_S}, 401: {"WWW-Authenticate": "Bearer"}}.get(self.status)
        return Response(msgspec.json.encode(self.body), self.status, headers, JSON)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: Exception) -> ApiError:
    """Any exception as what the client is told; a bug of ours does not show its insides."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLong):
        return bad_request(str(error), error.param or "prompt", error.code or CONTEXT_LENGTH_EXCEEDED)
    if isinstance(error, RequestError):
        return bad_request(str(error), error.param, error.code)
    if isinstance(error, (RequestFailed, OutOfDeviceMemory)):
        return ApiError(500, str(error), kind="server_error", code="request_failed")
    if isinstance(error, EngineError):
        return ApiError(503, str(error), kind="service_unavailable", code="engine_unavailable")
    if isinstance(error, HTTPException):
        return _of_routing(error)
    if isinstance(error, BrimError):
        return ApiError(500, str(error), kind="server_error")
    return ApiError(500, "Internal error, a bug in Brim; the server's log says more.", kind="server_error")


def raise_named(message: str, kind: str | None) -> None:
    """Raise what the engine reported of a request: `kind` is the BrimError's name."""
    found = getattr(errors, kind or "", None)
    if isinstance(found, type) and issubclass(found, BrimError):
        raise found(message)
    raise RequestFailed(message)


async def answer_error(request: Request, error: Exception) -> Response:
    """The app's handler of every exception."""
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        verb, path = request.method, request.url.path
        return _of_routing(error, f"{verb} {path}").response()
    return as_api_error(error).response()


def _of_routing(error: HTTPException, what: str = "This request") -> ApiError:
    if error.status_code == 404:
        return ApiError(404, f"{what}: there is no such path. The API is under /v1.", code="not_found")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        hint = f" It takes {allowed}." if allowed else ""
        return ApiError(405, f"{what}: this path does not take that method.{hint}", code="method_not_allowed")
    return ApiError(error.status_code, str(error.detail))
