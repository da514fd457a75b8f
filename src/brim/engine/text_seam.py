"""What the front-end half of the engine needs of the text package. Owns the protocols; the front end wires them up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from brim.engine.sampling_params import SamplingParams


class Detokenizer(Protocol):
    """Turns the ids of one sequence into text as they come, never a broken character."""

    def feed(self, ids: Sequence[int], /) -> str:
        """The text these ids complete."""

    def finish(self) -> str:
        """What is left at the end."""


class StopScanner(Protocol):
    """Looks for stop strings in the text of one sequence as it comes."""

    def feed(self, text: str, /) -> tuple[str, str | None]:
        """Text that can be shown now (what may begin a stop string is held back), and the stop string found, if any.

        After one was found the text ends before it, or after it where it is to be included."""

    def finish(self) -> str:
        """The text held back, at the end."""


class TextTools(Protocol):
    """Makes the above for a sequence, and names single tokens. One a model; shared by all requests."""

    def new_detokenizer(self, params: SamplingParams, /) -> Detokenizer:
        """For one sequence's generated ids."""

    def new_stop_scanner(self, params: SamplingParams, /) -> StopScanner:
        """For one sequence with stop strings."""

    def token_text(self, token_id: int, /) -> str:
        """One token as text, for log-probabilities; special tokens by name."""
