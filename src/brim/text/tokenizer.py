"""Text to token ids and back. Owns checking of the text, special tokens around it, and pieces as bytes.

Where the vocabulary comes from is `gguf_tokenizer`'s and `json_tokenizer`'s; streaming is `detokenizer`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from brim.errors import BrokenModel, RequestError, TokenizerError
from brim.formats.gguf import GGUFFile
from brim.formats.model_files import ModelFiles
from brim.text.byte_alphabet import byte_of_character
from brim.text.gguf_tokenizer import parts_from_gguf
from brim.text.json_tokenizer import parts_from_json, read_json_object
from brim.text.spm_encoder import SPACE
from brim.text.tokenizer_parts import TokenizerParts
from brim.text.utf8_pieces import decode_ready

_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """One model's tokenizer. Thread-safe; ids are ints in [0, vocab_size).

    vocab_size counts the tokenizer's tokens; a model's embedding may have more rows, whose ids decode to nothing.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        self._parts = parts
        self._alphabet = byte_of_character() if parts.spelling == "bytes" else {}
        self._bytes: dict[int, bytes] = {}
        self.vocab_size = parts.vocab_size
        self.bos_id = parts.bos_id
        self.eos_ids = parts.eos_ids
        self.special_ids = parts.special_ids
        self.strips_leading_space = parts.strips_leading_space
        self.replaces_each_byte = parts.spelling == "spaces"

    @classmethod
    def from_files(cls, files: ModelFiles, gguf: GGUFFile | None = None) -> Tokenizer:
        """The tokenizer of a resolved model; `gguf` saves reading the header again where the caller has the file open.

        Raises TokenizerError where the model has none, BrokenModel, UnsupportedModel.
        """
        path = files.tokenizer_path
        if path is None:
            raise TokenizerError(
                f"{files.name} has no tokenizer.json; give a folder or .gguf file that has one with --tokenizer."
            )
        if path.suffix == ".gguf":
            return cls.from_gguf(gguf if gguf is not None and gguf.path == path else path)
        return cls.from_json(path, files.tokenizer_config_path, files.generation_config_path)

    @classmethod
    def from_gguf(cls, source: GGUFFile | Path) -> Tokenizer:
        """The tokenizer in a GGUF header. Raises BrokenModel, UnsupportedModel, ModelNotFound."""
        if isinstance(source, GGUFFile):
            return cls(parts_from_gguf(source.metadata))
        file = GGUFFile.open(source)
        try:
            return cls(parts_from_gguf(file.metadata))
        except BrokenModel as error:
            raise BrokenModel(f"{source}: {error}") from error
        finally:
            file.close()

    @classmethod
    def from_json(cls, path: Path, config_path: Path | None = None, generation_config_path: Path | None = None) -> Tokenizer:
        """The tokenizer of a tokenizer.json and the config files beside it. Raises TokenizerError, UnsupportedModel."""
        return cls(parts_from_json(path, read_json_object(config_path), read_json_object(generation_config_path)))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; special tokens written in it count as such. add_special_tokens: with BOS and the like around it.

        Raises RequestError for text that is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"The text has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}, which is not valid "
                "Unicode; send it as proper UTF-8.",
                code="invalid_unicode",
            ) from error
        ids = self._parts.encode(text)
        return [*self._parts.prefix_ids, *ids, *self._parts.suffix_ids] if add_special_tokens else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids without a piece count as nothing, invalid UTF-8 becomes U+FFFD."""
        special_ids = self.special_ids if skip_special_tokens else frozenset()
        data = b"".join([self.token_bytes(token_id) for token_id in ids if token_id not in special_ids])
        text, _ = decode_ready(data, each_byte=self.replaces_each_byte, final=True)
        return text[1:] if self.strips_leading_space and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for (part of a character, perhaps); empty for an id without a piece."""
        data = self._bytes.get(token_id)
        if data is None:
            piece = self._parts.piece_of(token_id)
            data = b"" if piece is None else self._piece_bytes(piece)
            if piece is not None:
                self._bytes[token_id] = data
        return data

    def id_to_piece(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None for an id without a piece."""
        return self._parts.piece_of(token_id)

    def piece_to_id(self, piece: str) -> int | None:
        """The id of a piece as the vocabulary spells it; None where it has no such piece."""
        try:
            return self._parts.id_of(piece)
        except UnicodeEncodeError:
            return None

    def is_special(self, token_id: int) -> bool:
        """Whether skip_special_tokens leaves this token out."""
        return token_id in self.special_ids

    def _piece_bytes(self, piece: str) -> bytes:
        if self._parts.spelling == "spaces":
            match = _BYTE_PIECE.fullmatch(piece)
            return bytes([int(match[1], 16)]) if match else piece.replace(SPACE, " ").encode()
        try:
            return bytes([self._alphabet[character] for character in piece])
        except KeyError:
            return piece.encode()
