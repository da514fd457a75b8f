"""Streams whose client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

import pytest
from tests.unit.server.conftest import Api

from brim.server.streams import ClientGone, merge, unless_gone

Message = MutableMapping[str, Any]
PATH = "/v1/completions"


@pytest.mark.parametrize("leaves_at", ["http.response.start", "http.response.body"])
@pytest.mark.parametrize("prompts", [["hello"], ["hello", "world"]])
def test_a_client_that_takes_nothing_more_leaves_nothing_behind(api: Api, leaves_at: str, prompts: list[str]) -> None:
    """It stops reading at the head or at the first event, then hangs up while the server waits to send."""
    body = json.dumps({"prompt": prompts, "ignore_eos": True, "max_tokens": 50, "stream": True}).encode()
    scope = {
        "type": "http", "method": "POST", "path": PATH, "raw_path": PATH.encode(), "root_path": "", "query_string": b"",
        "headers": [], "http_version": "1.1", "scheme": "http",
    }  # fmt: skip

    async def call() -> None:
        stuck, inbox = asyncio.Event(), [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if inbox:
                return inbox.pop()
            await stuck.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == leaves_at:
                stuck.set()
                await asyncio.Event().wait()

        await asyncio.wait_for(api.app(scope, receive, send), 5)
        assert api.engine.num_waiting == 0

    asyncio.run(call())
    assert api.engine.core.stats()["running"] == api.engine.core.stats()["waiting"] == 0
    api.complete("next")


def test_merged_streams_close_together_where_one_fails() -> None:
    closed = []

    async def endless(name: str) -> Any:
        try:
            while True:
                await asyncio.sleep(0)
                yield name
        finally:
            closed.append(name)

    async def failing() -> Any:
        yield "x"
        raise ValueError("broken")

    async def read() -> None:
        with pytest.raises(ValueError, match="broken"):
            async for _ in merge([endless("a"), failing(), endless("b")]):
                pass

    asyncio.run(read())
    assert sorted(closed) == ["a", "b"]


def test_work_ends_with_its_client() -> None:
    async def receive() -> Message:
        await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def wait() -> None:
        with pytest.raises(ClientGone):
            await unless_gone(receive, asyncio.Event().wait())
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(wait())
