"""What the HTTP side needs of the engine and of the model's text side. Owns the protocols; tests give their own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from brim.engine.completion import CompletionChunk
from brim.engine.sampling_params import SamplingParams
from brim.engine.start_watch import PhaseSoFar
from brim.engine.text_seam import TextTools


class EngineClient(Protocol):
    """See `engine.async_engine.AsyncEngine`, which is one."""

    @property
    def is_healthy(self) -> bool:
        """True where a request sent now would be served."""

    @property
    def reason(self) -> str:
        """Why it is not healthy."""

    @property
    def info(self) -> Mapping[str, Any]:
        """What the engine says of itself."""

    @property
    def num_restarts(self) -> int:
        """How often the engine process was started again."""

    @property
    def start_phases(self) -> Sequence[PhaseSoFar]:
        """What its last start went through, so far."""

    def generate(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, *, priority: int = 0
    ) -> AsyncGenerator[list[CompletionChunk]]:
        """Chunks of one request, those that came since in one list; closing the iterator aborts it."""

    async def stats(self) -> dict[str, Any]:
        """Counts of the engine core."""

    async def memory(self) -> dict[str, Any]:
        """The memory account."""


class ServerTokenizer(Protocol):
    """See `text.tokenizer.Tokenizer`."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids."""

    def id_to_piece(self, token_id: int) -> str | None:
        """A token as its vocabulary spells it."""

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text; empty for special ones."""


class ServerFront(Protocol):
    """See `brim.front.Front`."""

    @property
    def tokenizer(self) -> ServerTokenizer | None:
        """None: token ids only."""

    @property
    def chat_template(self) -> object | None:
        """None: no conversations."""

    @property
    def text_tools(self) -> TextTools:
        """For the engine's output."""

    @property
    def model_names(self) -> tuple[str, ...]:
        """What requests may call the model; the first is what it is called in answers."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a prompt. Raises RequestError."""

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Ids of a conversation by the chat template; extra: variables of the template's own. Raises RequestError."""
