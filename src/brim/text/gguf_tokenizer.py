"""The tokenizer a GGUF header describes. Owns the meaning of its `tokenizer.ggml.*` keys.

Model `llama` is SentencePiece-style BPE (Gemma, Llama 2), `gpt2` byte-level BPE with a merge list (Llama 3, Qwen, Mistral).
Results equal those of `transformers` for the same file, except where that departs from the model's own tokenizer: whole words
that are pieces are not merged for llama-bpe and tekken, and qwen2 text is NFC-normalised, as those models' own tokenizers do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.models import BPE

from brim.errors import BrokenModel, UnsupportedModel
from brim.text.added_tokens import AddedTokens
from brim.text.library_errors import library_errors
from brim.text.spm_encoder import SPACE, SpmEncoder
from brim.text.tokenizer_parts import TokenizerParts

_KEY = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_GEMMA = ("gemma", "gemma2", "gemma3")
_ENDS_OF_TURN = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>")

_WORD_LIKE_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD_PATTERNS = {
    "llama-bpe": _WORD_LIKE_LLAMA3 % "{1,3}",
    "qwen2": _WORD_LIKE_LLAMA3 % "",
    "tekken": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}  # how each vocabulary's training cut text into words, from the models' published tokenizer files
_SAME_AS = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
_GPT2_PATTERN = ("default", "gpt-2", "gpt2")
_WHOLE_WORDS = ("llama-bpe", "tekken")
_BOS_BY_DEFAULT = ("llama-bpe", "tekken")


def parts_from_gguf(metadata: Mapping[str, Any]) -> TokenizerParts:
    """The tokenizer of this header. Raises UnsupportedModel for other kinds, BrokenModel where keys are missing or disagree."""
    model = metadata.get(_KEY + "model")
    if model is None:
        raise BrokenModel("The GGUF header has no tokenizer; give one with --tokenizer or convert the model again.")
    if model not in ("llama", "gpt2"):
        raise UnsupportedModel(f"GGUF tokenizer '{model}' is not supported; give a folder with tokenizer.json with --tokenizer.")
    vocabulary = _Vocabulary(metadata)
    return _spm_parts(vocabulary) if model == "llama" else _byte_level_parts(vocabulary)


class _Vocabulary:
    """The keys both kinds share, checked."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata
        pieces = metadata.get(_KEY + "tokens")
        if not isinstance(pieces, list) or not pieces or not all(type(piece) is str for piece in pieces):
            raise BrokenModel("The GGUF header has no usable 'tokenizer.ggml.tokens'; download or convert the file again.")
        self.pieces: list[str] = pieces
        types = self._numbers("token_type")
        self.types: list[int] = [1] * len(pieces) if types is None else types.astype(np.int64).tolist()
        self.bos_id = self._id("bos_token_id")
        self.unknown_id = self._id("unknown_token_id")

    def _numbers(self, key: str) -> np.ndarray[Any, np.dtype[Any]] | None:
        """One number a piece, or None where the key is missing."""
        values = self.metadata.get(_KEY + key)
        if values is None:
            return None
        if not isinstance(values, np.ndarray) or len(values) != len(self.pieces):
            raise BrokenModel(f"The GGUF header's 'tokenizer.ggml.{key}' does not match its tokens; convert the file again.")
        return values

    def scores(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        scores = self._numbers("scores")
        if scores is None:
            raise BrokenModel("The GGUF header has no 'tokenizer.ggml.scores'; download or convert the file again.")
        return scores.astype(np.float32)

    def _id(self, key: str) -> int | None:
        value = self.metadata.get(_KEY + key)
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < len(self.pieces):
            raise BrokenModel(f"The GGUF header's 'tokenizer.ggml.{key}' is {value!r}, not a token; convert the file again.")
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.metadata.get(_KEY + key, default))

    def special_ids(self) -> frozenset[int]:
        """Control and unknown tokens, and those that have a role."""
        ids = {token_id for token_id, kind in enumerate(self.types) if kind in (_CONTROL, _UNKNOWN)}
        roles = (self.bos_id, self.unknown_id, self._id("eos_token_id"), self._id("padding_token_id"))
        return frozenset(ids.union(role for role in roles if role is not None))

    def eos_ids(self) -> tuple[int, ...]:
        """The declared ends, and control tokens whose names say that a turn ends (files declare one of several)."""
        ends = [self._id(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
        named = [at for at, kind in enumerate(self.types) if kind == _CONTROL and self.pieces[at] in _ENDS_OF_TURN]
        return tuple(dict.fromkeys([end for end in ends if end is not None] + named))

    def around(self, add_bos: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """prefix_ids and suffix_ids."""
        eos_id = self._id("eos_token_id")
        prefix = (self.bos_id,) if self.bos_id is not None and self.flag("add_bos_token", add_bos) else ()
        return prefix, (eos_id,) if eos_id is not None and self.flag("add_eos_token", False) else ()

    def piece_of(self, token_id: int) -> str | None:
        return self.pieces[token_id] if 0 <= token_id < len(self.pieces) else None


def _spm_parts(vocabulary: _Vocabulary) -> TokenizerParts:
    """SentencePiece-style. Gemma's pieces rank by id (its scores do not follow its merge order), others by score."""
    gemma = vocabulary.metadata.get("general.architecture") in _GEMMA
    if gemma:  # runs of spaces are stored as spaces there
        vocabulary.pieces = [_as_marks(piece) if " " in piece else piece for piece in vocabulary.pieces]
    ids = {piece: token_id for token_id, piece in enumerate(vocabulary.pieces)}
    unknown_id = vocabulary.unknown_id if vocabulary.unknown_id is not None else ids.get("<unk>", 0)
    encoder = SpmEncoder(ids, None if gemma else vocabulary.scores(), unknown_id)
    special_ids = vocabulary.special_ids()
    added = AddedTokens(
        (piece, token_id)
        for token_id, (piece, kind) in enumerate(zip(vocabulary.pieces, vocabulary.types, strict=True))
        if token_id in special_ids or (kind == _USER_DEFINED and not (gemma and set(piece) == {SPACE}))
    )
    adds_space = vocabulary.flag("add_space_prefix", not gemma)

    def encode(text: str) -> list[int]:
        token_ids: list[int] = []
        for number, part in enumerate(added.split(text)):
            if isinstance(part, int):
                token_ids.append(part)
                continue
            marked = part.replace(" ", SPACE)
            if adds_space and number == 0 and marked[0] != SPACE:
                marked = SPACE + marked
            token_ids += encoder.encode(marked)
        return token_ids

    prefix_ids, suffix_ids = vocabulary.around(add_bos=True)
    return TokenizerParts(
        encode=encode,
        piece_of=vocabulary.piece_of,
        id_of=ids.get,
        vocab_size=len(vocabulary.pieces),
        spelling="spaces",
        special_ids=special_ids,
        bos_id=vocabulary.bos_id,
        eos_ids=vocabulary.eos_ids(),
        prefix_ids=prefix_ids,
        suffix_ids=suffix_ids,
        strips_leading_space=adds_space,
    )


def _as_marks(piece: str) -> str:
    return SPACE * len(piece) if not piece.strip() else piece


def _byte_level_parts(vocabulary: _Vocabulary) -> TokenizerParts:
    pre = str(vocabulary.metadata.get(_KEY + "pre", "default"))
    pre = _SAME_AS.get(pre, pre)
    library = _byte_level_library(vocabulary, pre)
    prefix_ids, suffix_ids = vocabulary.around(add_bos=pre in _BOS_BY_DEFAULT)

    def encode(text: str) -> list[int]:
        token_ids: list[int] = library.encode(text, add_special_tokens=False).ids
        return token_ids

    return TokenizerParts(
        encode=encode,
        piece_of=vocabulary.piece_of,
        id_of=library.token_to_id,
        vocab_size=len(vocabulary.pieces),
        spelling="bytes",
        special_ids=vocabulary.special_ids(),
        bos_id=vocabulary.bos_id,
        eos_ids=vocabulary.eos_ids(),
        prefix_ids=prefix_ids,
        suffix_ids=suffix_ids,
        strips_leading_space=False,
    )


def _byte_level_library(vocabulary: _Vocabulary, pre: str) -> LibraryTokenizer:
    if pre not in _WORD_PATTERNS and pre not in _GPT2_PATTERN:
        known = ", ".join([*_WORD_PATTERNS, *_SAME_AS, *_GPT2_PATTERN])
        raise UnsupportedModel(
            f"GGUF pre-tokenizer '{pre}' is not supported (Brim has {known}); give a tokenizer.json with --tokenizer."
        )
    merges = vocabulary.metadata.get(_KEY + "merges")
    if not isinstance(merges, list) or not all(type(merge) is str for merge in merges):
        raise BrokenModel("The GGUF header has no usable 'tokenizer.ggml.merges'; download or convert the file again.")
    ids = {piece: token_id for token_id, piece in enumerate(vocabulary.pieces)}
    with library_errors("The GGUF header's merges and tokens disagree", "convert the file again"):
        library = LibraryTokenizer(BPE(ids, _pairs(merges), ignore_merges=pre in _WHOLE_WORDS))
    if pre == "qwen2":
        library.normalizer = normalizers.NFC()
    if pre in _GPT2_PATTERN:
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        words = pre_tokenizers.Split(Regex(_WORD_PATTERNS[pre]), behavior="isolated")
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    special_ids = vocabulary.special_ids()
    added = [
        AddedToken(vocabulary.pieces[token_id], normalized=False, special=token_id in special_ids)
        for token_id, kind in enumerate(vocabulary.types)
        if (token_id in special_ids or kind == _USER_DEFINED) and vocabulary.pieces[token_id]
    ]
    library.add_tokens(added)
    return library


def _pairs(merges: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space:
            raise BrokenModel(f"The GGUF header's merge {merge!r} is not a pair; convert the file again.")
        pairs.append((left, right))
    return pairs
