"""From the engine's token ids to what a caller reads. Owns the front-end half of each request: text, stop strings, n sequences,
log-probabilities with text, usage. Runs beside the caller (HTTP server or LLM), not in the engine; torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from brim.engine.completion import CompletionChunk, PositionScores, TokenScore, Usage
from brim.engine.messages import AbortRequest, AddRequest, PositionLogprobs, SequenceOutput
from brim.engine.sampling_params import SamplingParams
from brim.engine.text_seam import Detokenizer, StopScanner, TextTools
from brim.errors import InvalidParameter

_SEED_SPAN = 1 << 64


@dataclass(slots=True)
class _Request:
    """A caller's request. open: child ids of its sequences that are not finished."""

    request_id: str
    num_prompt_tokens: int
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    open: set[str] = field(default_factory=set)

    @property
    def usage(self) -> Usage:
        return Usage(self.num_prompt_tokens, self.num_output_tokens, self.num_cached_tokens)


@dataclass(slots=True)
class _Child:
    """One of its n sequences. stops: None where the request has no stop strings."""

    request: _Request
    index: int
    params: SamplingParams
    detokenizer: Detokenizer
    stops: StopScanner | None


@dataclass(frozen=True, slots=True)
class ProcessedOutputs:
    """Chunks for callers, in order, and sequences the engine must stop because their stop string was found."""

    chunks: list[CompletionChunk]
    aborts: list[AbortRequest]


class OutputProcessor:
    """Keeps a little state a sequence. Not thread-safe: one caller at a time."""

    def __init__(self, text_tools: TextTools) -> None:
        self._text = text_tools
        self._requests: dict[str, _Request] = {}
        self._children: dict[str, _Child] = {}

    @property
    def num_requests(self) -> int:
        """Requests not finished."""
        return len(self._requests)

    def add(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, *, arrival_s: float, priority: int = 0
    ) -> list[AddRequest]:
        """Start a request: its n sequences, to be sent to the engine. Raises InvalidParameter where the id is in use.

        With a seed, sequence i has seed + i. Only the first sequence scores the prompt.
        """
        if request_id in self._requests:
            raise InvalidParameter(f"Request id '{request_id}' is in use.", param="request_id")
        request = self._requests[request_id] = _Request(request_id, len(prompt_ids))
        messages = []
        for index in range(params.n):
            child_id = request_id if params.n == 1 else f"{request_id}#{index}"
            child_params = _child_params(params, index)
            self._children[child_id] = _Child(
                request,
                index,
                child_params,
                self._text.new_detokenizer(child_params),
                self._text.new_stop_scanner(child_params) if params.stop else None,
            )
            request.open.add(child_id)
            messages.append(AddRequest(child_id, list(prompt_ids), child_params, arrival_s, priority))
        return messages

    def abort(self, request_id: str) -> list[AbortRequest]:
        """Forget a request (its caller is gone); the engine must stop these sequences. Unknown ids are ignored."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return []
        for child_id in request.open:
            del self._children[child_id]
        return [AbortRequest(child_id) for child_id in sorted(request.open)]

    def fail_all(self, error: str, error_kind: str) -> list[CompletionChunk]:
        """The engine is gone: the last chunk of every sequence of every request."""
        children = list(self._children)
        return self.process(
            SequenceOutput(child_id, [], "error", error=error, error_kind=error_kind) for child_id in children
        ).chunks

    def process(self, outputs: Iterable[SequenceOutput]) -> ProcessedOutputs:
        """What one engine step means for callers. Outputs of forgotten or stopped sequences are dropped."""
        chunks: list[CompletionChunk] = []
        aborts: list[AbortRequest] = []
        for output in outputs:
            child = self._children.get(output.request_id)
            if child is None:
                continue
            chunk, stopped_here = self._advance(child, output)
            if stopped_here:
                aborts.append(AbortRequest(output.request_id))
            chunks.append(chunk)
        return ProcessedOutputs(chunks, aborts)

    def _advance(self, child: _Child, output: SequenceOutput) -> tuple[CompletionChunk, bool]:
        """The chunk, and whether a stop string ended the sequence while the engine still runs it."""
        request, reason = child.request, output.finish_reason
        text, stop_string = self._new_text(child, output)
        stop_reason: str | int | None = output.stop_token_id
        if stop_string is not None:
            reason, stop_reason = "stop", stop_string
        request.num_output_tokens += len(output.new_token_ids)
        if child.index == 0:
            request.num_cached_tokens = max(request.num_cached_tokens, output.num_cached_tokens)
        if reason is not None:
            self._close(child, output.request_id)
        chunk = CompletionChunk(
            request_id=request.request_id,
            index=child.index,
            text=text,
            token_ids=output.new_token_ids,
            finish_reason=reason,
            stop_reason=stop_reason,
            logprobs=self._scores(output.logprobs),
            prompt_logprobs=self._scores(output.prompt_logprobs),
            usage=request.usage,
            is_last=not request.open,
            error=output.error,
            error_kind=output.error_kind,
        )
        return chunk, stop_string is not None and output.finish_reason is None

    def _new_text(self, child: _Child, output: SequenceOutput) -> tuple[str, str | None]:
        """Text to show now, and the stop string found. The token that ended a sequence is not text, unless it is asked for."""
        ids, reason = output.new_token_ids, output.finish_reason
        if reason == "stop" and not (child.params.include_stop_str_in_output and output.stop_token_id is not None):
            ids = ids[:-1]
        text = child.detokenizer.feed(ids) if ids else ""
        if reason is not None:
            text += child.detokenizer.finish()
        if child.stops is None:
            return text, None
        shown, stop_string = child.stops.feed(text) if text else ("", None)
        if reason is not None and stop_string is None:
            shown += child.stops.finish()
        return shown, stop_string

    def _close(self, child: _Child, child_id: str) -> None:
        del self._children[child_id]
        child.request.open.discard(child_id)
        if not child.request.open:
            del self._requests[child.request.request_id]

    def _scores(self, positions: Sequence[PositionLogprobs | None] | None) -> list[Any] | None:
        if positions is None:
            return None
        return [None if position is None else self._score(position) for position in positions]

    def _score(self, position: PositionLogprobs) -> PositionScores:
        name = self._text.token_text
        best = zip(position.top_ids, position.top_logprobs, strict=True)
        return PositionScores(
            TokenScore(position.token_id, name(position.token_id), position.logprob, position.rank),
            [TokenScore(token, name(token), logprob, rank) for rank, (token, logprob) in enumerate(best, 1)],
        )


def _child_params(params: SamplingParams, index: int) -> SamplingParams:
    """Sequence `index` of n: seed + index (wrapped to 64 bits), and prompt scores for the first only."""
    if params.n == 1:
        return params
    changes: dict[str, Any] = {"n": 1}
    if params.seed is not None:
        changes["seed"] = (params.seed + index + (_SEED_SPAN >> 1)) % _SEED_SPAN - (_SEED_SPAN >> 1)
    if index:
        changes["prompt_logprobs"] = None
    return msgspec.structs.replace(params, **changes)
