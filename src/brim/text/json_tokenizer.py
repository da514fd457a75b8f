"""The tokenizer of a Hugging Face folder: tokenizer.json with what tokenizer_config.json and generation_config.json add.

Owns reading them through the `tokenizers` library, and the check that Brim can decode what it encodes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as LibraryTokenizer

from brim.errors import TokenizerError, UnsupportedModel
from brim.text.library_errors import library_errors
from brim.text.tokenizer_parts import PieceSpelling, TokenizerParts


def parts_from_json(path: Path, config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> TokenizerParts:
    """The tokenizer of `path` (a tokenizer.json) and the parsed config files beside it (empty where there are none).

    Raises TokenizerError for a file that cannot be read, UnsupportedModel for kinds other than SentencePiece-style and
    byte-level BPE.
    """
    with library_errors(f"{path} cannot be read", "download the model again"):
        return _parts(path, config, generation_config)


def _parts(path: Path, config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> TokenizerParts:
    library = _library(path)
    _add_missing_tokens(library, config, path)
    spelling, strips_leading_space = _spelling(library, path)
    bos_id, eos_id = _role(library, config, "bos_token"), _role(library, config, "eos_token")
    prefix_ids, suffix_ids = _around(library, config, bos_id, eos_id)
    added = library.get_added_tokens_decoder()
    roles = [_role(library, config, name) for name in ("unk_token", "pad_token")]
    special_ids = {token_id for token_id, token in added.items() if token.special}
    special_ids.update(role for role in (bos_id, eos_id, *roles) if role is not None)

    def encode(text: str) -> list[int]:
        with library_errors(f"{path} fails on this text", "download the model again"):
            token_ids: list[int] = library.encode(text, add_special_tokens=False).ids
        return token_ids

    def piece_of(token_id: int) -> str | None:
        piece: str | None = library.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        return piece

    return TokenizerParts(
        encode=encode,
        piece_of=piece_of,
        id_of=library.token_to_id,
        vocab_size=library.get_vocab_size(with_added_tokens=True),
        spelling=spelling,
        special_ids=frozenset(special_ids),
        bos_id=bos_id,
        eos_ids=_eos_ids(eos_id, generation_config),
        prefix_ids=prefix_ids,
        suffix_ids=suffix_ids,
        strips_leading_space=strips_leading_space,
    )


def read_json_object(path: Path | None) -> dict[str, Any]:
    """The object in `path`; empty where `path` is None. Raises TokenizerError where it cannot be read."""
    if path is None:
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} cannot be read ({error}); download the model again.") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} is not a JSON object; download the model again.")
    return content


def _library(path: Path) -> LibraryTokenizer:
    library = LibraryTokenizer.from_buffer(path.read_bytes())
    library.no_truncation()
    library.no_padding()
    return library


def _add_missing_tokens(library: LibraryTokenizer, config: Mapping[str, Any], path: Path) -> None:
    """Tokens that only tokenizer_config.json lists (`added_tokens_decoder`), under the ids it gives them."""
    listed = config.get("added_tokens_decoder") or {}
    known = library.get_added_tokens_decoder()
    try:
        entries = sorted((int(key), entry) for key, entry in listed.items() if int(key) not in known)
        for token_id, entry in entries:
            flags = {name: bool(entry.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            library.add_tokens([AddedToken(str(entry["content"]), **flags)])
            if library.token_to_id(str(entry["content"])) != token_id:
                raise TokenizerError(
                    f"{path.parent}: token {token_id} differs between tokenizer.json and its config; download again."
                )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TokenizerError(f"{path.parent}: tokenizer_config.json has an unusable token list; download it again.") from error


def _spelling(library: LibraryTokenizer, path: Path) -> tuple[PieceSpelling, bool]:
    """How pieces spell text, and whether decoding strips one leading space; from the file's decoder."""
    state = json.loads(library.decoder.__getstate__()) if library.decoder is not None else {}
    steps = state.get("decoders", [state])
    kinds = {step.get("type") for step in steps}
    if kinds == {"ByteLevel"}:
        return "bytes", False
    spaces = any(step.get("type") == "Replace" and step.get("content") == " " for step in steps)
    metaspace = [step for step in steps if step.get("type") == "Metaspace"]
    if kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and (spaces or metaspace):
        prepends = any(step.get("prepend_scheme", "always") != "never" for step in metaspace)
        return "spaces", prepends or any(step.get("type") == "Strip" and step.get("start", 0) > 0 for step in steps)
    raise UnsupportedModel(
        f"{path} has a decoder Brim does not know ({', '.join(map(str, kinds))}); Brim has BPE tokenizers only."
    )


def _role(library: LibraryTokenizer, config: Mapping[str, Any], name: str) -> int | None:
    """The id of `bos_token` and the like: a string, or an object with `content`."""
    token = config.get(name)
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        return None
    token_id: int | None = library.token_to_id(content)
    return token_id


def _around(
    library: LibraryTokenizer, config: Mapping[str, Any], bos_id: int | None, eos_id: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor puts around a text, with add_bos_token and add_eos_token having the last word."""
    bare = library.encode("a", add_special_tokens=False).ids
    full = library.encode("a", add_special_tokens=True).ids
    starts = [at for at in range(len(full) - len(bare) + 1) if full[at : at + len(bare)] == bare]
    at = starts[0] if starts else 0
    prefix, suffix = tuple(full[:at]), tuple(full[at + len(bare) :])
    if bos_id is not None and isinstance(config.get("add_bos_token"), bool):
        prefix = prefix[1:] if prefix[:1] == (bos_id,) else prefix
        prefix = (bos_id, *prefix) if config["add_bos_token"] else prefix
    if eos_id is not None and isinstance(config.get("add_eos_token"), bool):
        suffix = suffix[:-1] if suffix[-1:] == (eos_id,) else suffix
        suffix = (*suffix, eos_id) if config["add_eos_token"] else suffix
    return prefix, suffix


def _eos_ids(eos_id: int | None, generation_config: Mapping[str, Any]) -> tuple[int, ...]:
    declared = generation_config.get("eos_token_id")
    values = declared if isinstance(declared, list) else [declared]
    return tuple(dict.fromkeys(value for value in (eos_id, *values) if type(value) is int and value >= 0))
