"""The front end's half of a model: tokenizer, chat template, names. Owns opening them; torch-free, for a small server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brim.config.schema import BrimConfig
from brim.engine.sampling_params import SamplingParams
from brim.engine.text_seam import Detokenizer, StopScanner, TextTools
from brim.errors import RequestError
from brim.formats.gguf import GGUFFile
from brim.formats.model_files import resolve_model
from brim.text.chat_template import ChatTemplate
from brim.text.detokenizer import IncrementalDetokenizer
from brim.text.stop_strings import StopChecker
from brim.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Front:
    """tokenizer None: a model of bare weights; it takes and gives token ids only. model_names: what requests may call it."""

    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    text_tools: TextTools
    model_names: tuple[str, ...]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a prompt. Raises RequestError for invalid text, or where the model has no tokenizer."""
        if self.tokenizer is None:
            raise RequestError("This model has no tokenizer; send token ids, or start with --tokenizer.", param="prompt")
        return self.tokenizer.encode(text, add_special_tokens)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, extra: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Ids of a conversation by the model's chat template. Raises RequestError, TokenizerError."""
        if self.chat_template is None:
            raise RequestError(
                "This model has no chat template, so it cannot take messages; start with --chat-template FILE, or send a prompt "
                "to /v1/completions.",
                param="messages",
            )
        text = self.chat_template.render(messages, add_generation_prompt=add_generation_prompt, extra=extra)
        return self.encode(text, add_special_tokens=False)


def open_front(config: BrimConfig) -> Front:
    """Open the text side of the configured model; the weights are not touched. Raises ModelError."""
    files = resolve_model(config.model.model, config.model.revision)
    if config.model.tokenizer is not None:
        files = files.with_tokenizer(Path(config.model.tokenizer).expanduser())
    gguf = GGUFFile.open(files.tokenizer_path) if files.tokenizer_path and files.tokenizer_path.suffix == ".gguf" else None
    try:
        has_no_text = files.tokenizer_path is None and config.model.load_format == "dummy"
        tokenizer = None if has_no_text else Tokenizer.from_files(files, gguf)
        template = ChatTemplate.from_files(files, gguf, config.model.chat_template)
    finally:
        if gguf is not None:
            gguf.close()
    names = config.model.served_model_name or (config.model.model,)
    tools: TextTools = TokenizerTools(tokenizer) if tokenizer is not None else IdsOnlyTools()
    return Front(tokenizer, template, tools, names)


class TokenizerTools:
    """TextTools over a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def new_detokenizer(self, params: SamplingParams, /) -> Detokenizer:
        """For one sequence's generated ids, which continue its prompt."""
        return _SequenceDetokenizer(self._tokenizer, params.skip_special_tokens)

    def new_stop_scanner(self, params: SamplingParams, /) -> StopScanner:
        """For one sequence with stop strings."""
        return _SequenceStops(params.stop, params.include_stop_str_in_output)

    def token_text(self, token_id: int, /) -> str:
        """One token as text; parts of characters as U+FFFD, special tokens by name."""
        if self._tokenizer.is_special(token_id):
            return self._tokenizer.id_to_piece(token_id) or ""
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")


class IdsOnlyTools:
    """TextTools of a model without tokenizer: no text, no stop strings."""

    def new_detokenizer(self, params: SamplingParams, /) -> Detokenizer:
        """Gives no text."""
        return _NoText()

    def new_stop_scanner(self, params: SamplingParams, /) -> StopScanner:
        """Finds nothing."""
        return _SequenceStops(params.stop, params.include_stop_str_in_output)

    def token_text(self, token_id: int, /) -> str:
        """No text."""
        return ""


class _SequenceDetokenizer:
    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        inner = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens, is_continuation=True)
        self._feed_all, self._finish = inner.feed_all, inner.finish

    def feed(self, ids: Sequence[int], /) -> str:
        return self._feed_all(ids)

    def finish(self) -> str:
        return self._finish()


class _SequenceStops:
    def __init__(self, stop: Sequence[str], include: bool) -> None:
        self._checker = StopChecker(stop, include)

    def feed(self, text: str, /) -> tuple[str, str | None]:
        shown = self._checker.feed(text)
        return shown, self._checker.matched

    def finish(self) -> str:
        return self._checker.finish()


class _NoText:
    def feed(self, ids: Sequence[int], /) -> str:
        return ""

    def finish(self) -> str:
        return ""
