"""POST /v1/chat/completions: conversations by the chat template. Owns the shape of its choices, whole and streamed."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from brim.engine.completion import CompletionChunk, CompletionResult, SequenceCompletion, TokenScore
from brim.server.generation import Answer, Generation
from brim.server.logprobs import chat_logprobs, prompt_logprobs
from brim.server.metrics import ServerMetrics
from brim.server.openai_types import IGNORED, REFUSED, ChatRequest
from brim.server.prompts import Prompts
from brim.server.request_body import parse_body
from brim.server.sampling import chat_params
from brim.server.seams import EngineClient, ServerFront


class ChatCompletions:
    """Answers requests of one server."""

    def __init__(self, engine: EngineClient, front: ServerFront, prompts: Prompts, metrics: ServerMetrics) -> None:
        self._engine = engine
        self._front = front
        self._prompts = prompts
        self._metrics = metrics

    async def answer(self, request: Request, raw: bytes) -> Response:
        """Raises BrimError or ApiError for what is wrong with the request."""
        body = parse_body(raw, ChatRequest, refused=REFUSED, ignored=IGNORED)
        model = self._prompts.check_model(body.model)
        params = chat_params(body)
        settings: dict[str, Any] = {"add_generation_prompt": body.add_generation_prompt}
        if body.chat_template_kwargs:
            settings["extra"] = body.chat_template_kwargs
        ids = await self._prompts.of_chat(body.messages, settings)
        generation = Generation(self._engine, self._metrics, "chatcmpl", [ids], params, body.priority)
        answer = Answer(request, body, generation, "chat.completion", model)
        choices = _Choices(body, self._front)
        if body.stream:
            return await answer.streamed(choices.of_chunk, opening=choices.opening())
        return await answer.whole(choices.of_results)


class _Choices:
    """Chunks and results as choices."""

    def __init__(self, body: ChatRequest, front: ServerFront) -> None:
        self._body = body
        self._tokenizer = front.tokenizer

    def of_results(self, results: list[CompletionResult]) -> dict[str, Any]:
        """What is of this kind in a whole answer."""
        (result,) = results
        body: dict[str, Any] = {"choices": [self._of_sequence(sequence) for sequence in result.sequences]}
        if self._body.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(result.prompt_logprobs)
        return body

    def _of_sequence(self, sequence: SequenceCompletion) -> dict[str, Any]:
        return {
            "index": sequence.index,
            "message": {"role": "assistant", "content": sequence.text, "refusal": None},
            "logprobs": self._logprobs(sequence.logprobs),
            "finish_reason": sequence.finish_reason,
            "stop_reason": sequence.stop_reason,
        }

    def opening(self) -> list[dict[str, Any]]:
        """The first frame: whose words these are."""
        return [
            {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            for index in range(self._body.n)
        ]

    def of_chunk(self, number: int, chunk: CompletionChunk) -> list[dict[str, Any]]:
        """The choice of a streamed frame; none where there is nothing to say."""
        if not chunk.text and not chunk.logprobs and chunk.finish_reason is None:
            return []
        choice: dict[str, Any] = {
            "index": chunk.index,
            "delta": {"content": chunk.text} if chunk.text else {},
            "logprobs": self._logprobs(chunk.logprobs),
            "finish_reason": chunk.finish_reason,
        }
        if chunk.finish_reason is not None:
            choice["stop_reason"] = chunk.stop_reason
        return [choice]

    def _logprobs(self, scores: Any) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(scores or [], self._body.top_logprobs or 0, self._token_bytes)

    def _token_bytes(self, score: TokenScore) -> bytes:
        exact = self._tokenizer.token_bytes(score.token_id) if self._tokenizer is not None else b""
        return exact or score.text.encode()
