"""POST /v1/completions: text continued. Owns the shape of its choices, whole and streamed, and echo."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from brim.engine.completion import CompletionChunk, CompletionResult, PositionScores, SequenceCompletion, Usage
from brim.errors import InvalidParameter
from brim.server.generation import Answer, Generation, usage_json
from brim.server.logprobs import completion_logprobs, prompt_logprobs
from brim.server.metrics import ServerMetrics
from brim.server.openai_types import IGNORED, REFUSED, CompletionRequest
from brim.server.prompts import EncodedPrompt, Prompts
from brim.server.request_body import parse_body
from brim.server.sampling import completion_params
from brim.server.seams import EngineClient, ServerFront


class Completions:
    """Answers requests of one server."""

    def __init__(self, engine: EngineClient, front: ServerFront, prompts: Prompts, metrics: ServerMetrics) -> None:
        self._engine = engine
        self._front = front
        self._prompts = prompts
        self._metrics = metrics

    async def answer(self, request: Request, raw: bytes) -> Response:
        """Raises BrimError or ApiError for what is wrong with the request."""
        body = parse_body(raw, CompletionRequest, refused=REFUSED, ignored=IGNORED)
        model = self._prompts.check_model(body.model)
        params = completion_params(body)
        if body.stream and body.echo and body.logprobs is not None and body.n > 1:
            raise InvalidParameter("echo with logprobs and n > 1 cannot be streamed: leave one of them out.", param="stream")
        encoded = await self._prompts.of_completion(body.prompt, body.n, add_special_tokens=body.add_special_tokens)
        ids = [prompt.ids for prompt in encoded]
        generation = Generation(self._engine, self._metrics, "cmpl", ids, params, body.priority)
        answer = Answer(request, body, generation, "text_completion", model)
        echoes = [self._text_of(prompt) for prompt in encoded] if body.echo else None
        choices = _Choices(body, echoes, self._front)
        if body.stream:
            hidden_tokens = body.n * len(encoded) if choices.is_prompt_only else 0
            return await answer.streamed(choices.of_chunk, hidden_tokens=hidden_tokens)
        return await answer.whole(choices.of_results)

    def _text_of(self, prompt: EncodedPrompt) -> str:
        if prompt.text is not None or self._front.tokenizer is None:
            return prompt.text or ""
        return self._front.tokenizer.decode(prompt.ids)


class _Choices:
    """Chunks and results as choices. echoes: text before each prompt's answers, if wanted."""

    def __init__(self, body: CompletionRequest, echoes: list[str] | None, front: ServerFront) -> None:
        self._body = body
        self._echoes = echoes
        self._front = front
        self._started: set[int] = set()
        self._num_characters: dict[int, int] = {}  # of each choice so far, for text_offset
        self.is_prompt_only = body.echo and body.max_tokens == 0

    def of_results(self, results: list[CompletionResult]) -> dict[str, Any]:
        """What is of this kind in a whole answer."""
        choices = [
            self._of_sequence(number, sequence, result) for number, result in enumerate(results) for sequence in result.sequences
        ]
        body: dict[str, Any] = {"choices": choices}
        if self.is_prompt_only:
            body["usage"] = usage_json(Usage(sum(r.usage.prompt_tokens for r in results), 0))
        return body

    def _of_sequence(self, number: int, sequence: SequenceCompletion, result: CompletionResult) -> dict[str, Any]:
        text = self._echoes[number] if self._echoes is not None else ""
        scores: list[PositionScores | None] = []
        if self._echoes is not None:
            scores += result.prompt_logprobs or []
        if not self.is_prompt_only:
            text += sequence.text
            scores += sequence.logprobs or []
        choice = self._choice(number, sequence.index, text, sequence.finish_reason, sequence.stop_reason)
        if self._body.logprobs is not None:
            choice["logprobs"] = completion_logprobs(scores)
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(result.prompt_logprobs)
        return choice

    def of_chunk(self, number: int, chunk: CompletionChunk) -> list[dict[str, Any]]:
        """The choice of a streamed frame; none where there is nothing to say."""
        index = number * self._body.n + chunk.index
        text = "" if self.is_prompt_only else chunk.text
        scores: list[PositionScores | None] = [] if self.is_prompt_only else list(chunk.logprobs or [])
        is_first = index not in self._started
        self._started.add(index)
        if self._echoes is not None and is_first:
            text = self._echoes[number] + text
            scores = [*(chunk.prompt_logprobs or []), *scores]
        if not text and not scores and chunk.finish_reason is None:
            return []
        choice = self._choice(number, chunk.index, text, chunk.finish_reason, chunk.stop_reason)
        if self._body.logprobs is not None:
            offset = self._num_characters.get(index, 0)
            choice["logprobs"] = found = completion_logprobs(scores, offset)
            self._num_characters[index] = offset + sum(len(token) for token in found["tokens"])
        if self._body.prompt_logprobs is not None and is_first:
            choice["prompt_logprobs"] = prompt_logprobs(chunk.prompt_logprobs)
        return [choice]

    def _choice(
        self, number: int, index: int, text: str, finish_reason: str | None, stop_reason: str | int | None
    ) -> dict[str, Any]:
        return {
            "index": number * self._body.n + index,
            "text": text,
            "logprobs": None,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }
