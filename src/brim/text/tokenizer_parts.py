"""What a tokenizer is made of, whatever file it came from. Owns the type only; `gguf_tokenizer` and `json_tokenizer` fill it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

PieceSpelling = Literal["spaces", "bytes"]  # SentencePiece's ▁ and <0x0A>, or the byte-level alphabet


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerParts:
    """All a `Tokenizer` needs.

    encode: ordinary and added tokens of a text without lone surrogates; adds nothing around them. piece_of: None for an id
    without a piece. prefix_ids, suffix_ids: what add_special_tokens puts around a text. strips_leading_space: a decoded text
    loses one.
    """

    encode: Callable[[str], list[int]]
    piece_of: Callable[[int], str | None]
    id_of: Callable[[str], int | None]
    vocab_size: int
    spelling: PieceSpelling
    special_ids: frozenset[int]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    strips_leading_space: bool
