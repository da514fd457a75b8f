"""Tokenizers to test with: the demo model's, and small ones of each kind made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from brim.errors import ModelNotFound
from brim.formats.model_files import resolve_model
from brim.text.gguf_tokenizer import parts_from_gguf
from brim.text.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. I'm sure they've seen it 123 times!",
    "def f(x):\n    return x + 1\n\n\nprint(f(41))\n",
    "Straße, naïve café, 中文字符 和 日本語, 😀😃",
] * 3


@pytest.fixture(scope="session")
def demo() -> Tokenizer:
    """The demo model's tokenizer (Gemma 3: 262,144 pieces)."""
    try:
        return Tokenizer.from_files(resolve_model("demo"))
    except ModelNotFound as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def library() -> LibraryTokenizer:
    """A small byte-level BPE, trained here, as the `tokenizers` library has it."""
    tokenizer = LibraryTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def byte_level_metadata(library: LibraryTokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same vocabulary as a GGUF header holds it."""
    folder = tmp_path_factory.mktemp("bpe")
    library.model.save(str(folder))
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    pieces = [library.id_to_token(token_id) for token_id in range(library.get_vocab_size())]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": np.array([3, 3] + [1] * (len(pieces) - 2), np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
    }


@pytest.fixture(scope="session")
def byte_level(byte_level_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer(parts_from_gguf(byte_level_metadata))


@pytest.fixture(scope="session")
def spm_metadata() -> dict[str, Any]:
    """A Llama-2-like header: byte pieces, scores, a space put before the text."""
    special = ["<unk>", "<s>", "</s>"]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    merged = ["▁t", "he", "▁the", "▁a", "in", "er", "▁he", "the", "an", "▁▁", "▁▁▁▁", "aa", "aaaa", "on", "ing", "ab", "bc"]
    characters = list("▁abcdefghijklmnopqrstuvwxyzé中0123456789.,!\n")
    pieces = special + byte_pieces + merged + characters
    scores = [0.0] * 259 + [-float(at) for at in range(len(merged) - 2)] + [-14.0, -14.0] + [-1e3] * len(characters)
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259), np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.fixture(scope="session")
def spm(spm_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer(parts_from_gguf(spm_metadata))


@pytest.fixture(scope="session")
def tokenizer_json(library: LibraryTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    library.save(str(path))
    return path
