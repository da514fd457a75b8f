"""What the front-end half of the engine needs of the text package. Owns the protocols; `tokenizer_text` makes the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from brim.engine.sampling_params import SamplingParams


class Detokenizer(Protocol):
    """Turns the ids of one sequence into text as they come, never a broken character."""

    def feed_all(self, token_ids: Sequence[int], /) -> str:
        """The text these ids complete."""

    def finish(self) -> str:
        """What is left at the end."""


class StopStrings(Protocol):
    """Looks for stop strings in the text of one sequence as it comes. matched: the one found, after which no text comes."""

    matched: str | None

    def feed(self, delta: str, /) -> str:
        """The text that can be shown now: up to the stop string, and nothing that may begin one."""

    def finish(self) -> str:
        """The text held back, at the end."""


class TextTools(Protocol):
    """Makes the above for a sequence, and spells single tokens. One a model; shared by all requests."""

    def new_detokenizer(self, params: SamplingParams, is_continuation: bool, /) -> Detokenizer:
        """For one sequence's generated ids. is_continuation: they continue a text, so a leading space is part of it."""

    def new_stop_strings(self, params: SamplingParams, /) -> StopStrings:
        """For one sequence that has stop strings."""

    def token_bytes(self, token_id: int, /) -> bytes:
        """The bytes one token stands for, for log-probabilities."""
