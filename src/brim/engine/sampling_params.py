"""How one request wants its tokens chosen. Owns the values and their validation; names are vLLM's and OpenAI's."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from brim.config.schema import MAX_LOGPROBS
from brim.errors import InvalidParameter

MAX_STOP_STRINGS = 64


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Immutable; raises InvalidParameter (naming the field) when built with a value out of range.

    temperature 0 is greedy. top_k 0 or -1 is off. max_tokens None: as many as the context holds. seed None: the engine draws
    one. logprobs N: the N best alternatives of each new token (0: only the chosen one). stop strings end the text before
    them unless include_stop_str_in_output. min_tokens holds back end-of-sequence and stop tokens.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            single = str if name == "stop" else int
            items = (
                (value,) if isinstance(value, single) and not isinstance(value, bool) else () if value is None else tuple(value)
            )
            msgspec.structs.force_setattr(self, name, items)
        self._check_numbers()
        self._check_counts()
        self._check_lists()

    @property
    def is_greedy(self) -> bool:
        """True where the most likely token is always taken."""
        return self.temperature < 1e-5

    @property
    def needs_history(self) -> bool:
        """True where a penalty looks at the ids generated so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def _check_numbers(self) -> None:
        _require_range("temperature", self.temperature, 0.0, 100.0)
        _require_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _require_range("min_p", self.min_p, 0.0, 1.0)
        _require_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _require_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)

    def _check_counts(self) -> None:
        _require_whole("n", self.n, 1, 128)
        _require_whole("top_k", self.top_k, -1, 1 << 30)
        _require_whole("min_tokens", self.min_tokens, 0, 1 << 30)
        if self.max_tokens is not None:
            _require_whole("max_tokens", self.max_tokens, 1, 1 << 30)
            if self.min_tokens > self.max_tokens:
                raise InvalidParameter(
                    f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}.", param="min_tokens"
                )
        if self.seed is not None:
            _require_whole("seed", self.seed, -(1 << 63), (1 << 63) - 1)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _require_whole(name, value, 0, MAX_LOGPROBS)

    def _check_lists(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidParameter(f"stop has {len(self.stop)} strings; at most {MAX_STOP_STRINGS}.", param="stop")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise InvalidParameter("stop must hold non-empty strings.", param="stop")
        for token_id in self.stop_token_ids:
            _require_whole("stop_token_ids", token_id, 0, 1 << 31)
        for token_id, bias in self.logit_bias.items():
            _require_whole("logit_bias", token_id, 0, 1 << 31)
            _require_range("logit_bias", bias, -100.0, 100.0)


def _require_range(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high or (open_low and value == low):
        least = "more than" if open_low else "at least"
        raise InvalidParameter(f"{name} must be {least} {low:g} and at most {high:g}, not {value!r}.", param=name)


def _require_whole(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidParameter(f"{name} must be a whole number from {low} to {high}, not {value!r}.", param=name)
