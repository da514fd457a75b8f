"""The app over an engine in this process, and a client without sockets."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import httpx
import pytest
from tests.unit.server.letters import LetterFront, build_letter_core

from brim.config.schema import BrimConfig, ModelConfig, ServerConfig
from brim.engine.completion import CompletionChunk
from brim.engine.output_processor import OutputProcessor
from brim.engine.sampling_params import SamplingParams
from brim.engine.start_watch import PhaseSoFar
from brim.errors import EngineDead
from brim.server.app import create_app


class LetterEngine:
    """EngineClient over a core that every waiting caller steps. dies_after: chunks until everything in flight fails."""

    def __init__(self, front: LetterFront) -> None:
        self.core, self.info = build_letter_core(CONFIG, lambda _: None)
        self.is_healthy = True
        self.reason = ""
        self.num_restarts = 0
        self.start_phases: list[PhaseSoFar] = []
        self.dies_after: int | None = None
        self.seen: list[SamplingParams] = []
        self.priorities: list[int] = []
        self._processor = OutputProcessor(front.text_tools)
        self._waiting: dict[str, deque[CompletionChunk]] = {}

    @property
    def num_waiting(self) -> int:
        """Callers in flight."""
        return len(self._waiting)

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, *, priority: int = 0
    ) -> AsyncGenerator[list[CompletionChunk]]:
        if not self.is_healthy:
            raise EngineDead(self.reason)
        self.seen.append(params)
        self.priorities.append(priority)
        queue = self._waiting[request_id] = deque()
        try:
            for message in self._processor.add(request_id, prompt_ids, params, arrival_s=time.time()):
                self.core.add(message)
            while True:
                while not queue:
                    self._step()
                    await asyncio.sleep(0)
                chunks = [queue.popleft() for _ in range(len(queue))]
                yield chunks
                if chunks[-1].is_last:
                    return
        finally:
            del self._waiting[request_id]
            for abort in self._processor.abort(request_id):
                self.core.abort(abort.request_id)

    def _step(self) -> None:
        processed = self._processor.process(self.core.step())
        chunks = processed.chunks
        for abort in processed.aborts:
            self.core.abort(abort.request_id)
        if self.dies_after is not None:
            self.dies_after -= len(chunks)
            if self.dies_after < 0:
                chunks = self._processor.fail_all("The engine process died.", "EngineDead")
        for chunk in chunks:
            self._waiting[chunk.request_id].append(chunk)

    async def stats(self) -> dict[str, Any]:
        if not self.is_healthy:
            raise EngineDead(self.reason)
        return {**self.core.stats(), "kv": self.core.memory_stats()}

    async def memory(self) -> dict[str, Any]:
        if not self.is_healthy:
            raise EngineDead(self.reason)
        return self.core.memory()


CONFIG = BrimConfig(model=ModelConfig(model="letters"), server=ServerConfig(max_body_bytes=100_000))


class Api:
    """One app with its engine; every call is a loop of its own."""

    def __init__(self, config: BrimConfig = CONFIG, front: LetterFront | None = None) -> None:
        self.front = front or LetterFront()
        self.engine = LetterEngine(self.front)
        self.app = create_app(self.engine, self.front, config, extra_keys=("own",))

    def request(self, method: str, path: str, **settings: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **settings)

        return asyncio.run(call())

    def get(self, path: str, **settings: Any) -> httpx.Response:
        return self.request("GET", path, **settings)

    def post(self, path: str, body: Any, **settings: Any) -> httpx.Response:
        return self.request("POST", path, json=body, **settings)

    def complete(self, prompt: Any = "hello", **fields: Any) -> dict[str, Any]:
        """A completion that must succeed."""
        answer = self.post("/v1/completions", {"prompt": prompt, "temperature": 0, "ignore_eos": True, **fields})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def stream(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        """The events of a stream that must begin."""
        answer = self.post(path, {"temperature": 0, "ignore_eos": True, "stream": True, **fields})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.text.endswith("data: [DONE]\n\n")
        return [json.loads(event.removeprefix("data: ")) for event in answer.text.split("\n\n")[:-2]]

    def refused(self, path: str, body: Any, status: int = 400, **settings: Any) -> dict[str, Any]:
        """The error object of a request that must be refused."""
        how = {"content": body} if isinstance(body, bytes) else {"json": body}
        answer = self.request("POST", path, **how, **settings)
        assert answer.status_code == status, answer.text
        error: dict[str, Any] = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert error["message"]
        return error


@pytest.fixture
def make_api() -> Callable[..., Api]:
    """Makes an Api; see there."""
    return Api


@pytest.fixture
def api() -> Api:
    """One with the usual settings."""
    return Api()
