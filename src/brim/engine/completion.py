"""What a caller gets for a request: chunks while it runs, a result at its end. Owns the values and how chunks add up."""

from __future__ import annotations

import msgspec

from brim.engine.messages import FinishReason


class TokenScore(msgspec.Struct, frozen=True):
    """A token with its text, log-probability and rank (1 = most likely)."""

    token_id: int
    text: str
    logprob: float
    rank: int


class PositionScores(msgspec.Struct, frozen=True):
    """One position: the token that is there, and the best alternatives in order (it may be among them)."""

    chosen: TokenScore
    top: list[TokenScore]


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request, all its sequences together; the prompt counts once. cached: prompt tokens from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


class CompletionChunk(msgspec.Struct, frozen=True, kw_only=True):
    """What is new for one sequence (`index` of n) of a request.

    stop_reason: the stop string or stop token id that ended it, None for end-of-sequence. usage: of the request so far.
    is_last: nothing more comes for the whole request. error and error_kind (a BrimError name) come with finish_reason "error".
    """

    request_id: str
    index: int = 0
    text: str = ""
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[PositionScores] | None = None
    prompt_logprobs: list[PositionScores | None] | None = None
    usage: Usage
    is_last: bool = False
    error: str | None = None
    error_kind: str | None = None


class SequenceCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """One finished sequence of a request."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: list[PositionScores] | None = None
    error: str | None = None
    error_kind: str | None = None


class CompletionResult(msgspec.Struct, frozen=True, kw_only=True):
    """A finished request: its n sequences in order."""

    request_id: str
    sequences: list[SequenceCompletion]
    usage: Usage
    prompt_logprobs: list[PositionScores | None] | None = None

    @property
    def text(self) -> str:
        """The text of the first sequence."""
        return self.sequences[0].text


class CompletionCollector:
    """Adds the chunks of one request up to its result."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._texts: dict[int, list[str]] = {}
        self._token_ids: dict[int, list[int]] = {}
        self._logprobs: dict[int, list[PositionScores]] = {}
        self._prompt_logprobs: list[PositionScores | None] | None = None
        self._finished: dict[int, SequenceCompletion] = {}

    def add(self, chunk: CompletionChunk) -> CompletionResult | None:
        """Take the next chunk; the result with the last one."""
        index = chunk.index
        self._texts.setdefault(index, []).append(chunk.text)
        self._token_ids.setdefault(index, []).extend(chunk.token_ids)
        if chunk.logprobs is not None:
            self._logprobs.setdefault(index, []).extend(chunk.logprobs)
        if chunk.prompt_logprobs is not None:
            self._prompt_logprobs = chunk.prompt_logprobs
        if chunk.finish_reason is not None:
            self._finished[index] = SequenceCompletion(
                index=index,
                text="".join(self._texts[index]),
                token_ids=self._token_ids[index],
                finish_reason=chunk.finish_reason,
                stop_reason=chunk.stop_reason,
                logprobs=self._logprobs.get(index),
                error=chunk.error,
                error_kind=chunk.error_kind,
            )
        if not chunk.is_last:
            return None
        return CompletionResult(
            request_id=self._request_id,
            sequences=[self._finished[i] for i in sorted(self._finished)],
            usage=chunk.usage,
            prompt_logprobs=self._prompt_logprobs,
        )
