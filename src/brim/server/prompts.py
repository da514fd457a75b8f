"""From what a request says to the token ids of its prompts. Owns prompt shapes and the checks that need no engine.

Much text is encoded in a thread, so that the streams of others go on; text that cannot fit is refused before any work on it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from brim.engine.completion import Usage
from brim.errors import InvalidParameter, PromptTooLong, RequestError
from brim.server.api_errors import CONTEXT_LENGTH_EXCEEDED, ApiError
from brim.server.openai_types import Prompt
from brim.server.seams import ServerFront

T = TypeVar("T")
MOST_SEQUENCES = 1024  # of one HTTP request: prompts times n
_IN_THREAD_FROM = 4096  # characters or ids of one HTTP request
MAX_TOKENIZE_CHARACTERS = 200_000
_ROLE = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,31}")


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """text None: it came as ids."""

    text: str | None
    ids: list[int]


class Prompts:
    """Encodes for one model. info: what its engine says of itself (max_model_len, vocab_size)."""

    def __init__(self, front: ServerFront, info: Callable[[], Mapping[str, Any]]) -> None:
        self._front = front
        self._info = info
        self._longest_piece: int | None = None

    def check_model(self, name: str | None) -> str:
        """The name to answer with. Raises ApiError 404 for a model that is not served."""
        names = self._front.model_names
        if name is None:
            return names[0]
        if name not in names:
            served = ", ".join(f"'{known}'" for known in names)
            message = f"The model '{name[:128]}' does not exist here; this server has {served}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return name

    async def of_completion(self, prompt: Prompt, n: int, *, add_special_tokens: bool) -> list[EncodedPrompt]:
        """One to many prompts. Raises RequestError."""
        each = _separate(prompt)
        if len(each) * n > MOST_SEQUENCES:
            raise InvalidParameter(f"{len(each)} prompts times n {n} is more than {MOST_SEQUENCES} sequences.", param="prompt")
        return await _run(lambda: [self._encoded(one, add_special_tokens) for one in each], sum(map(len, each)))

    def _encoded(self, prompt: str | list[int], add_special_tokens: bool) -> EncodedPrompt:
        """Cheap checks come first: they bound what one request can make us do."""
        if isinstance(prompt, list):
            self._check_length(prompt)
            return EncodedPrompt(None, self.checked(prompt))
        self._check_characters(len(prompt))
        ids = self._front.encode(prompt, add_special_tokens=add_special_tokens)
        self._check_length(ids)
        return EncodedPrompt(prompt, ids)

    async def of_chat(self, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[int]:
        """A conversation by the chat template. Raises RequestError."""
        ids = await self.encode_chat(messages, settings, within_context=True)
        self._check_length(ids)
        return ids

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of a text of at most MAX_TOKENIZE_CHARACTERS. Raises RequestError."""
        _check_tokenizable(len(text), "prompt")

        def work() -> list[int]:
            return self._front.encode(text, add_special_tokens=add_special_tokens)

        return await _run(work, len(text))

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], *, within_context: bool = False
    ) -> list[int]:
        """Ids of a conversation. within_context: raises PromptTooLong for one whose texts alone cannot fit."""
        if self._front.chat_template is None:
            raise RequestError(
                "This model has no chat template, so it can only continue text: use /v1/completions, or start the server with "
                "--chat-template.",
                param="messages",
                code="no_chat_template",
            )
        _check_messages(messages)

        def work() -> list[int]:
            num_characters = sum(map(_num_characters, messages))
            if within_context:
                self._check_characters(num_characters)
            else:
                _check_tokenizable(num_characters, "messages")
            return self._front.encode_chat(messages, **settings)

        return await asyncio.to_thread(work)  # templates may take their time, however short the messages

    def checked(self, ids: list[int], param: str = "prompt") -> list[int]:
        """The ids, each one of the vocabulary. Raises InvalidParameter."""
        vocab_size = int(self._info().get("vocab_size", 1 << 31))
        wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
        if wrong is not None:
            shown = wrong if abs(wrong) < 1 << 64 else "of that size"
            raise InvalidParameter(f"Token id {shown} is outside the vocabulary (0 to {vocab_size - 1}).", param=param)
        return ids

    def _check_characters(self, num_characters: int) -> None:
        """Refuse a text that no tokenization makes short enough: a token stands for at most the longest piece's characters."""
        most = int(self._info().get("max_model_len", 0))
        if not most or num_characters < most or self._front.tokenizer is None:
            return
        if self._longest_piece is None:
            piece_of = self._front.tokenizer.id_to_piece
            self._longest_piece = max((len(piece_of(i) or "") for i in range(int(self._info().get("vocab_size", 0)))), default=0)
        least = num_characters // (self._longest_piece or num_characters + 1)
        if least >= most:
            raise PromptTooLong(
                f"The prompt has {num_characters} characters, which are {least} tokens or more; with at least one new token it "
                f"passes the context length of {most}.",
                param="prompt",
                code=CONTEXT_LENGTH_EXCEEDED,
            )

    def _check_length(self, ids: Sequence[int]) -> None:
        most = int(self._info().get("max_model_len", 0))
        if not ids:
            raise InvalidParameter("The prompt is empty: it must have at least one token.", param="prompt")
        if most and len(ids) >= most:
            raise PromptTooLong(
                f"The prompt has {len(ids)} tokens; with at least one new token it passes the context length of {most}.",
                param="prompt",
                code=CONTEXT_LENGTH_EXCEEDED,
            )


def total_usage(usages: Sequence[Usage]) -> Usage:
    """Of the prompts of one HTTP request together."""
    return Usage(
        sum(usage.prompt_tokens for usage in usages),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.cached_tokens for usage in usages),
    )


def _separate(prompt: Prompt) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    texts = [part for part in prompt if isinstance(part, str)]
    lists = [part for part in prompt if isinstance(part, list)]
    ids = [part for part in prompt if isinstance(part, int)]
    if not prompt:
        raise InvalidParameter("prompt is an empty list: give text, token ids, or a list of either.", param="prompt")
    if len(ids) == len(prompt):
        return [ids]
    if len(texts) == len(prompt):
        return list(texts)
    if len(lists) == len(prompt):
        return list(lists)
    raise InvalidParameter("prompt mixes text and token ids: give a list of one kind.", param="prompt")


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise InvalidParameter("messages is empty: give at least one.", param="messages")
    for at, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        where = f"messages.{at}"
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise InvalidParameter(f"{where}.role must be a word such as user, assistant or system.", param=f"{where}.role")
        if message.get("tool_calls"):
            raise InvalidParameter("tool_calls are not supported: this server does not call tools.", param=f"{where}.tool_calls")
        if content is None and role == "assistant":
            continue
        if not isinstance(content, (str, list)):
            raise InvalidParameter(f"{where}.content must be a text or a list of text parts.", param=f"{where}.content")
        for part in content if isinstance(content, list) else ():
            is_text = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            if not is_text:
                raise InvalidParameter(f"{where}.content: only parts of type text are supported.", param=f"{where}.content")


def _num_characters(message: Mapping[str, Any]) -> int:
    content = message.get("content") or ""
    return len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)


def _check_tokenizable(num_characters: int, param: str) -> None:
    """Bounds what one /tokenize can make us do: about a second of work."""
    if num_characters > MAX_TOKENIZE_CHARACTERS:
        raise RequestError(
            f"The text has {num_characters:,} characters and one call takes {MAX_TOKENIZE_CHARACTERS:,}; send it in parts.",
            param=param,
            code="string_above_max_length",
        )


async def _run(work: Callable[[], T], size: int) -> T:
    return await asyncio.to_thread(work) if size >= _IN_THREAD_FROM else work()
