"""Tokenizers against their oracles: `transformers` (recorded) for Gemma 3, the `tokenizers` library for small ones made here."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as LibraryTokenizer

from brim.errors import BrimError, BrokenModel, RequestError, TokenizerError, UnsupportedModel
from brim.formats.model_files import ModelFiles
from brim.text.gguf_tokenizer import parts_from_gguf
from brim.text.spm_encoder import SpmEncoder
from brim.text.tokenizer import Tokenizer

_EXPECTED = json.loads((Path(__file__).parent / "gemma3_expected_ids.json").read_text())
_TEXT = st.text(st.one_of(st.sampled_from("▁ theinaé中\n<s>😀\x00"), st.characters(exclude_categories=["Cs"])), max_size=80)


@pytest.mark.parametrize("case", _EXPECTED, ids=lambda case: ascii(case["text"][:20]))
def test_gemma_ids_equal_transformers(demo: Tokenizer, case: dict[str, Any]) -> None:
    ids = demo.encode(case["text"], add_special_tokens=False)
    assert ids == case["ids"]
    assert demo.encode(case["text"]) == [2, *ids]
    assert demo.decode(ids) == case["decoded"]


def test_demo_properties(demo: Tokenizer) -> None:
    assert (demo.vocab_size, demo.bos_id, demo.eos_ids) == (262_144, 2, (1, 106))
    assert demo.is_special(105) and not demo.is_special(107)
    assert demo.id_to_piece(2) == "<bos>" and demo.piece_to_id("<bos>") == 2
    assert demo.id_to_piece(262_144) is None and demo.id_to_piece(-1) is None
    assert demo.decode([2, 262_200, -5, demo.encode("hi", False)[0], 1]) == "hi"
    assert demo.decode([2, 1], skip_special_tokens=False) == "<bos><eos>"


def test_long_prompts_are_encoded_quickly(demo: Tokenizer) -> None:
    text = "It was the best of times, it was the worst of times; call me 4711. " * 150
    started = time.perf_counter()
    ids = demo.encode(text)
    assert time.perf_counter() - started < 1.0  # about 0.01 s; the rest is room for a busy machine
    assert demo.decode(ids) == text


@given(text=_TEXT)
@settings(deadline=None)
def test_gemma_round_trip(demo: Tokenizer, text: str) -> None:
    ids = demo.encode(text, add_special_tokens=False)
    assert demo.decode(ids, skip_special_tokens=False) == text.replace("▁", " ")


def _llama_library(metadata: dict[str, Any]) -> LibraryTokenizer:
    """What `transformers` builds from such a header: merges derived from pieces and scores, in its order."""
    pieces, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"].tolist()
    ids = {piece: token_id for token_id, piece in enumerate(pieces)}
    merges = []
    for piece, score in zip(pieces, scores, strict=True):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((-score, -len(left), -len(right), ids[piece], left, right))
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    library = LibraryTokenizer(models.BPE(ids, pairs, fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in ("<unk>", "<s>", "</s>")])
    return library


@given(text=_TEXT)
@settings(deadline=None, max_examples=300)
def test_scored_pieces_equal_the_library(spm: Tokenizer, spm_metadata: dict[str, Any], text: str) -> None:
    library = _llama_library(spm_metadata)
    ids = spm.encode(text, add_special_tokens=False)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert spm.decode(ids) == library.decode(ids)


@given(text=st.text("ab▁c", max_size=200))
@settings(deadline=None)
def test_long_and_short_words_merge_alike(text: str) -> None:
    pieces = ["a", "b", "c", "▁", "ab", "aa", "▁a", "b▁", "aab", "ba", "bb", "▁▁", "▁▁b"]
    encoder = SpmEncoder({piece: at for at, piece in enumerate(pieces)}, None, 0)
    whole = [encoder._ids[symbol] for symbol in encoder._merge_long(list(text))] if text else []
    assert encoder.encode(text) == whole
    assert [encoder._ids[symbol] for symbol in encoder._merge_short(list(text))] == whole


def test_unknown_characters_without_byte_pieces() -> None:
    encoder = SpmEncoder({"<unk>": 0, "a": 1}, None, 0)
    assert encoder.encode("aéüa中") == [1, 0, 1, 0]


@given(text=_TEXT)
@settings(deadline=None)
def test_byte_level_equals_the_library(byte_level: Tokenizer, library: LibraryTokenizer, text: str) -> None:
    ids = byte_level.encode(text, add_special_tokens=False)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert byte_level.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("llama-bpe", ["I", "'m", " ", " at", " ", "123", "4", ".\n\n", "Straße"]),
        ("qwen2", ["I", "'m", " ", " at", " ", "1", "2", "3", "4", ".\n\n", "Straße"]),
        ("tekken", ["I", "'m", " ", " at", " ", "1", "2", "3", "4", ".\n\n", "Straße"]),
    ],
)
def test_words_are_cut_as_the_vocabulary_was_trained(byte_level_metadata: dict[str, Any], pre: str, words: list[str]) -> None:
    from brim.text.gguf_tokenizer import _byte_level_library, _Vocabulary

    library = _byte_level_library(_Vocabulary({**byte_level_metadata, "tokenizer.ggml.pre": pre}), pre)
    text = "I'm  at 1234.\n\nStraße"
    spans = [span for _, span in library.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[start:end] for start, end in spans] == words
    tokenizer = Tokenizer(parts_from_gguf({**byte_level_metadata, "tokenizer.ggml.pre": pre}))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a")[:-1] == ([] if pre == "qwen2" else [1])


@pytest.mark.parametrize("kind", ["demo", "spm", "byte_level"])
def test_lone_surrogates_are_refused(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    with pytest.raises(RequestError, match=r"U\+D83D.*character 2"):
        tokenizer.encode("ab\ud83d")
    assert tokenizer.piece_to_id("\ud83d") is None


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": None}, BrokenModel),
        ({"model": "bert"}, UnsupportedModel),
        ({"pre": "unheard-of"}, UnsupportedModel),
        ({"tokens": None}, BrokenModel),
        ({"tokens": [1, 2]}, BrokenModel),
        ({"merges": None}, BrokenModel),
        ({"merges": ["ab"]}, BrokenModel),
        ({"merges": ["zz qq"]}, TokenizerError),
        ({"token_type": np.zeros(3, np.int32)}, BrokenModel),
        ({"bos_token_id": 10**9}, BrokenModel),
        ({"eos_token_id": "x"}, BrokenModel),
        ({"model": "llama"}, BrokenModel),
    ],
)
def test_wrong_headers_say_so(byte_level_metadata: dict[str, Any], change: dict[str, Any], error: type[BrimError]) -> None:
    metadata = {**byte_level_metadata, **{f"tokenizer.ggml.{key}": value for key, value in change.items()}}
    with pytest.raises(error):
        parts_from_gguf({key: value for key, value in metadata.items() if value is not None})


def test_json_tokenizer(tokenizer_json: Path, library: LibraryTokenizer, tmp_path: Path) -> None:
    config, generation = tmp_path / "tokenizer_config.json", tmp_path / "generation_config.json"
    first = library.get_vocab_size()
    added = {str(first): {"content": "<tool>", "special": False}, str(first + 1): {"content": "<mask>", "special": True}}
    config.write_text(
        json.dumps(
            {"bos_token": {"content": "<|start|>"}, "eos_token": "<|end|>", "add_bos_token": True, "added_tokens_decoder": added}
        )
    )
    generation.write_text(json.dumps({"eos_token_id": [0, 7]}))
    tokenizer = Tokenizer.from_json(tokenizer_json, config, generation)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (0, 7), first + 2)
    plain = library.encode("Hello fox").ids
    assert tokenizer.encode("Hello fox") == [1, *plain]
    assert tokenizer.encode("a<tool>b<mask>", False)[1::2] == [first, first + 1]
    assert tokenizer.decode([1, *plain, first + 1, first, 10**12, -1]) == "Hello fox<tool>"


def test_post_processor_and_add_bos(tmp_path: Path, spm_metadata: dict[str, Any]) -> None:
    library = _llama_library(spm_metadata)
    library.normalizer = normalizers.NFC()
    library.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    path = tmp_path / "tokenizer.json"
    library.enable_truncation(2)
    library.save(str(path))
    tokenizer = Tokenizer.from_json(path)
    ids = tokenizer.encode("the theme", False)
    assert tokenizer.encode("the theme") == [1, *ids, 2]
    assert tokenizer.decode(ids) == "the theme"
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": false, "add_eos_token": false}')
    assert Tokenizer.from_json(path, config).encode("the theme") == ids


def test_unusable_json_says_so(tmp_path: Path, tokenizer_json: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for content in ("", "{}", "[]", '{"model": {"type": "BPE"}}'):
        path.write_text(content)
        with pytest.raises(TokenizerError, match="cannot be read"):
            Tokenizer.from_json(path)
    with pytest.raises(TokenizerError):
        Tokenizer.from_json(tmp_path / "absent.json")
    for content in (
        "{",
        "[]",
        '{"added_tokens_decoder": {"x": {}}}',
        '{"added_tokens_decoder": {"9000": {"content": "<|end|>"}}}',
    ):
        path.write_text(content)
        with pytest.raises(TokenizerError):
            Tokenizer.from_json(tokenizer_json, path)
    words = LibraryTokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.decoder = decoders.WordPiece()
    words.save(str(path))
    with pytest.raises(UnsupportedModel, match="WordPiece"):
        Tokenizer.from_json(path)


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_json_raises_only_brim_errors(tokenizer_json: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(tokenizer_json.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 6))] = data.draw(
            st.sampled_from([b"9", b"-1", b'"', b"null", b"[]", b"x", b""])
        )
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    try:
        tokenizer = Tokenizer.from_json(path)
        tokenizer.decode(tokenizer.encode("The <|end|> é"))
    except BrimError:
        return


def test_models_without_a_tokenizer_say_so() -> None:
    files = ModelFiles(name="bare", kind="config_only", weight_paths=())
    with pytest.raises(TokenizerError, match="--tokenizer"):
        Tokenizer.from_files(files)
