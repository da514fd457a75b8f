"""The text package behind the seam of the output processor. Owns only the wiring of one tokenizer."""

from __future__ import annotations

from brim.engine.sampling_params import SamplingParams
from brim.text.detokenizer import IncrementalDetokenizer
from brim.text.stop_strings import StopChecker
from brim.text.tokenizer import Tokenizer


class TokenizerText:
    """`text_seam.TextTools` over a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def new_detokenizer(self, params: SamplingParams, is_continuation: bool) -> IncrementalDetokenizer:
        """For one sequence's generated ids."""
        return IncrementalDetokenizer(
            self._tokenizer, skip_special_tokens=params.skip_special_tokens, is_continuation=is_continuation
        )

    def new_stop_strings(self, params: SamplingParams) -> StopChecker:
        """For one sequence that has stop strings."""
        return StopChecker(params.stop, params.include_stop_str_in_output)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; empty for an id without a piece."""
        return self._tokenizer.token_bytes(token_id)
