"""One HTTP request's way through the engine: its prompts generate beside each other. Owns ids, merging, metrics and failures."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import msgspec
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from brim.engine.completion import CompletionChunk, CompletionCollector, CompletionResult, Usage
from brim.engine.sampling_params import SamplingParams
from brim.server.api_errors import JSON, as_api_error, raise_named
from brim.server.metrics import ServerMetrics
from brim.server.openai_types import GenerationRequest
from brim.server.prompts import total_usage
from brim.server.seams import EngineClient
from brim.server.streams import DONE_FRAME, ClientGone, EventStream, error_body, frame_of, merge, unless_gone

Chunks = AsyncGenerator[tuple[int, list[CompletionChunk]]]
MakeChoices = Callable[[int, CompletionChunk], list[dict[str, Any]]]
_GONE = 499  # nobody reads it; for logs
_LOG = logging.getLogger("brim.server")


class Generation:
    """prompt_ids in the order of their numbers. Chunks of a failed sequence raise what they name."""

    def __init__(
        self,
        engine: EngineClient,
        metrics: ServerMetrics,
        prefix: str,
        prompt_ids: Sequence[list[int]],
        params: SamplingParams,
        priority: int,
    ) -> None:
        self.request_id = f"{prefix}-{uuid.uuid4().hex}"
        self.created_s = int(time.time())
        self._engine = engine
        self._metrics = metrics
        self._prompt_ids = prompt_ids
        self._params = params
        self._priority = priority
        self._usages = [Usage(len(ids), 0) for ids in prompt_ids]

    @property
    def usage(self) -> Usage:
        """So far, all prompts together."""
        return total_usage(self._usages)

    def usage_at(self, number: int, usage: Usage) -> Usage:
        """All prompts together when this one's was `usage`."""
        return total_usage([*self._usages[:number], usage, *self._usages[number + 1 :]])

    def chunks(self) -> Chunks:
        """(prompt number, chunks that came since) as they come. Raises BrimError; closing it aborts everything."""
        streams = [self._one(number) for number in range(len(self._prompt_ids))]
        return streams[0] if len(streams) == 1 else merge(streams)

    async def results(self) -> list[CompletionResult]:
        """All of it, when it is done: one result a prompt."""
        ids = [self._engine_id(number) for number in range(len(self._prompt_ids))]
        collectors = [CompletionCollector(engine_id) for engine_id in ids]
        results: dict[int, CompletionResult] = {}
        async with contextlib.aclosing(self.chunks()) as chunks:
            async for number, some in chunks:
                for chunk in some:
                    result = collectors[number].add(chunk)
                    if result is not None:
                        results[number] = result
        return [results[number] for number in range(len(ids))]

    def _engine_id(self, number: int) -> str:
        return self.request_id if len(self._prompt_ids) == 1 else f"{self.request_id}-{number}"

    async def _one(self, number: int) -> Chunks:
        ids = self._prompt_ids[number]
        stream = self._engine.generate(self._engine_id(number), ids, self._params, priority=self._priority)
        with self._metrics.observe(len(ids)) as observed:
            async with contextlib.aclosing(stream) as several:
                async for chunks in several:
                    observed.note(chunks[-1])
                    failed = next((index for index, chunk in enumerate(chunks) if chunk.error is not None), None)
                    if failed is None:
                        self._usages[number] = chunks[-1].usage
                        yield number, chunks
                        continue
                    if failed:
                        yield number, chunks[:failed]
                    raise_named(str(chunks[failed].error), chunks[failed].error_kind)


class Answer:
    """How a generation is answered: `kind` is the object's name in the API, `model` what it is called there."""

    def __init__(self, request: Request, body: GenerationRequest, generation: Generation, kind: str, model: str) -> None:
        self._request = request
        self._generation = generation
        self._stream_options = body.stream_options
        self._kind = kind
        self._model = model

    async def whole(self, make: Callable[[list[CompletionResult]], dict[str, Any]]) -> Response:
        """One JSON object; `make` gives what belongs to this kind (choices and the like)."""
        try:
            results = await unless_gone(self._request.receive, self._generation.results())
        except ClientGone:
            return Response(status_code=_GONE)
        body = {**self._head(self._kind), **make(results)}
        body.setdefault("usage", usage_json(self._generation.usage))
        return Response(msgspec.json.encode(body), media_type=JSON)

    async def streamed(self, make: MakeChoices, *, opening: Sequence[dict[str, Any]] = (), hidden_tokens: int = 0) -> Response:
        """Server-sent events. The first chunk is awaited, so that a refused request is a plain error and no stream.

        opening: choices of a frame before all others. hidden_tokens: generated tokens that are not the client's.
        """
        chunks = self._generation.chunks()
        try:
            first = await unless_gone(self._request.receive, _next(chunks))
        except ClientGone:
            await chunks.aclose()
            return Response(status_code=_GONE)
        except BaseException:
            await chunks.aclose()
            raise
        return _StreamResponse(EventStream(self._frames(first, chunks, make, opening, hidden_tokens)), chunks)

    async def _frames(
        self,
        first: tuple[int, list[CompletionChunk]],
        chunks: Chunks,
        make: MakeChoices,
        opening: Sequence[dict[str, Any]],
        hidden_tokens: int,
    ) -> AsyncGenerator[bytes]:
        options = self._stream_options
        wants_usage = options is not None and options.include_usage
        continuous = options is not None and options.continuous_usage_stats
        head = msgspec.json.encode(self._head(f"{self._kind}.chunk" if self._kind == "chat.completion" else self._kind))[:-1]

        def frame(choices: Sequence[dict[str, Any]], usage: Usage | None) -> bytes:
            tail = b',"usage":' + msgspec.json.encode(usage_json(usage, hidden_tokens)) if usage or wants_usage else b""
            return frame_of(head + b',"choices":' + msgspec.json.encode(choices) + tail + b"}")

        def frames(number: int, chunks: Sequence[CompletionChunk]) -> bytes:
            found = []
            for chunk in chunks:
                choices = make(number, chunk)
                if choices:
                    found.append(frame(choices, self._generation.usage_at(number, chunk.usage) if continuous else None))
            return b"".join(found)

        try:
            async with contextlib.aclosing(chunks):
                if opening:
                    yield frame(opening, self._generation.usage if continuous else None)
                if found := frames(*first):
                    yield found
                async for number, several in chunks:
                    if found := frames(number, several):
                        yield found
            if wants_usage:
                yield frame([], self._generation.usage)
        except Exception as error:
            if as_api_error(error).status == 500:
                _LOG.exception("a stream failed")
            yield frame_of(msgspec.json.encode(error_body(error)))
        yield DONE_FRAME

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._generation.request_id, "object": kind, "created": self._generation.created_s, "model": self._model}


class _StreamResponse(Response):
    """An EventStream where FastAPI wants a Response. chunks: closed with it, even where its first frame was never asked for."""

    def __init__(self, events: EventStream, chunks: Chunks) -> None:
        super().__init__()
        self._events = events
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._chunks):
            await self._events(scope, receive, send)


def usage_json(usage: Usage | None, hidden_tokens: int = 0) -> dict[str, Any] | None:
    """OpenAI's usage."""
    if usage is None:
        return None
    completion_tokens = max(0, usage.completion_tokens - hidden_tokens)
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": usage.prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


async def _next(chunks: Chunks) -> tuple[int, list[CompletionChunk]]:
    return await anext(chunks)
