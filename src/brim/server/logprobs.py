"""Log-probabilities in the three shapes that clients know. Owns the shapes only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from brim.engine.completion import PositionScores, TokenScore

TokenBytes = Callable[[TokenScore], bytes]
_LEAST = -9999.0  # JSON has no minus infinity


def completion_logprobs(scores: Iterable[PositionScores | None], offset: int = 0) -> dict[str, list[Any]]:
    """OpenAI's of text completions: four lists. None: the first token of an echoed prompt, which has no score.

    offset: characters of the choice's text before the first of these tokens.
    """
    tokens: list[str] = []
    values: list[float | None] = []
    best: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for position in scores:
        tokens.append(position.chosen.text if position is not None else "")
        values.append(finite(position.chosen.logprob) if position is not None else None)
        best.append(_by_text(position) if position is not None else None)
        offsets.append(offset)
        offset += len(tokens[-1])
    return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": best}


def chat_logprobs(scores: Iterable[PositionScores], num_best: int, token_bytes: TokenBytes) -> dict[str, Any]:
    """OpenAI's of conversations: one object a token."""

    def entry(score: TokenScore) -> dict[str, Any]:
        return {"token": score.text, "logprob": finite(score.logprob), "bytes": list(token_bytes(score))}

    return {
        "content": [
            {**entry(position.chosen), "top_logprobs": [entry(score) for score in position.top[:num_best]]} for position in scores
        ]
    }


def prompt_logprobs(scores: Sequence[PositionScores | None] | None) -> list[dict[str, Any] | None] | None:
    """vLLM's of prompts: per position, token id -> logprob, rank and text."""
    if scores is None:
        return None
    return [None if position is None else _by_id(position) for position in scores]


def finite(logprob: float) -> float:
    """A number that JSON can carry."""
    return logprob if math.isfinite(logprob) else _LEAST


def _by_text(position: PositionScores) -> dict[str, float]:
    found: dict[str, float] = {}
    for score in (*position.top, position.chosen):  # the best first: tokens of the same text keep the best one's value
        found.setdefault(score.text, finite(score.logprob))
    return found


def _by_id(position: PositionScores) -> dict[str, Any]:
    return {
        str(score.token_id): {"logprob": finite(score.logprob), "rank": score.rank, "decoded_token": score.text}
        for score in (*position.top, position.chosen)
    }
