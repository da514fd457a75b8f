"""From the bytes of a request to a typed value, or a 400 that says what to change. Owns reading, limits, JSON and field names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from starlette.requests import ClientDisconnect

from brim.server.api_errors import ApiError, bad_request

T = TypeVar("T", bound=msgspec.Struct)
_DISCARDED = 4  # times the limit: how much of a body that is too large is read on, so that the client can read the answer
_AT = re.compile(r" - at `\$\.?(.*)`$")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. A larger one is a 413, decided while reading."""
    declared = request.headers.get("content-length", "")
    too_large = declared.isdigit() and int(declared) > max_bytes
    if too_large and request.headers.get("expect"):
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    num_bytes = 0
    try:
        async for part in request.stream():
            num_bytes += len(part)
            if num_bytes > max_bytes:
                too_large = True
                parts.clear()
            if num_bytes > _DISCARDED * max_bytes:
                break
            if not too_large:
                parts.append(part)
    except ClientDisconnect:
        raise bad_request("The connection was closed before the whole body came.") from None
    if too_large:
        raise _too_large(max_bytes)
    return b"".join(parts)


def parse_body(body: bytes, kind: type[T], *, refused: Mapping[str, str], ignored: frozenset[str]) -> T:
    """A JSON object as a `kind`.

    refused: fields that mean something we do not have -> what to do; they may be given with a value that asks for nothing.
    ignored: fields accepted without effect. Any other field is an error that names the nearest known one.
    """
    fields = _object(body)
    known = set(kind.__struct_encode_fields__)
    for name, value in list(fields.items()):
        if name in known:
            continue
        if name in refused and not _asks_nothing(name, value):
            raise bad_request(f"'{name}' is not supported: {refused[name]}", name, "unsupported_parameter")
        if name not in refused and name not in ignored:
            close = difflib.get_close_matches(name, sorted(known | ignored), n=1, cutoff=0.6)
            hint = f"; did you mean '{close[0]}'?" if close else "."
            raise bad_request(f"Unknown field {_shown(name)}{hint}", name[:64], "unknown_parameter")
        del fields[name]
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise _wrong_value(str(error)) from None


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise bad_request(f"The body is not valid UTF-8: {error.reason} at byte {error.start} of a string.") from None
    except RecursionError:
        raise bad_request("The body is not usable JSON: it is nested too deeply.") from None
    except msgspec.MsgspecError as error:
        raise bad_request(f"The body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise bad_request(f"The body must be a JSON object, not {_json_name(value)}.")
    return value


def _wrong_value(text: str) -> ApiError:
    """msgspec's sentence with the field's name first."""
    found = _AT.search(text)
    sentence = _AT.sub("", text).replace("`", "")
    path = found.group(1) if found else ""
    missing = re.match(r"Object missing required field (\w+)", sentence)
    if missing:
        param = f"{path}.{missing.group(1)}".lstrip(".")
        return bad_request(f"'{param}' is missing.", param, "missing_required_parameter")
    if not path:
        return bad_request(f"{sentence}.")
    lowered = sentence[:1].lower() + sentence[1:]
    return bad_request(f"'{path}': {lowered}.", path, "invalid_type")


def _asks_nothing(name: str, value: Any) -> bool:
    """`tools: []`, `tool_choice: "none"`, `response_format: {"type": "text"}` and the like."""
    if value is None or value is False or value in ([], {}, ""):
        return True
    neutral = {
        "tool_choice": ("none", "auto"),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "best_of": (1,),
        "length_penalty": (1, 1.0),
        "reasoning_effort": ("none",),
    }
    return value in neutral.get(name, ())


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"The body is larger than {max_bytes:,} bytes, the server's --max-body-bytes.", code="body_too_large")


def _shown(name: str) -> str:
    return repr(name if len(name) <= 64 else name[:61] + "...")


def _json_name(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
