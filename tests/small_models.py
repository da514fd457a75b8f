"""Small random models in folders, with a byte-level tokenizer: what tests of the whole engine run in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from brim.text.byte_alphabet import byte_of_character

VOCAB, EOS = 300, 256  # 256 bytes, the end, and 43 pieces of two letters
WINDOW = 40
_COMMON = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 512, "torch_dtype": "float32", "eos_token_id": EOS,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "model_type": "llama", "num_hidden_layers": 2},
    "gemma3": {
        **_COMMON, "model_type": "gemma3_text", "num_hidden_layers": 4, "sliding_window": WINDOW, "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 16,
    },
}  # fmt: skip


def write_small_model(folder: Path, family: str = "llama", *, poisoned_id: int | None = None) -> Path:
    """config.json, model.safetensors and tokenizer.json; the embedding of poisoned_id is NaN (llama, whose lm_head is apart)."""
    config = CONFIGS[family]
    tensors = _tensors(config)
    if poisoned_id is not None:
        assert family == "llama"
        tensors["model.embed_tokens.weight"][poisoned_id] = float("nan")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer.json of VOCAB ids."""
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))


def _tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights under which tokens depend on their whole context."""
    generator = torch.Generator().manual_seed(0)
    gemma = config["model_type"] == "gemma3_text"
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim

    def matrix(rows: int, cols: int, gain: float = 1.5) -> Tensor:
        return torch.randn(rows, cols, generator=generator) * (gain / cols**0.5)

    def norm(size: int) -> Tensor:
        return torch.rand(size, generator=generator) + (0.0 if gemma else 0.5)

    tensors = {"model.embed_tokens.weight": matrix(VOCAB, hidden, 0.5 if gemma else 4.0), "model.norm.weight": norm(hidden)}
    if not gemma:
        tensors["lm_head.weight"] = matrix(VOCAB, hidden, 2.0)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for part, shape in (("q", (heads, hidden)), ("k", (kv_heads, hidden)), ("v", (kv_heads, hidden)), ("o", (hidden, heads))):
            tensors[f"{prefix}self_attn.{part}_proj.weight"] = matrix(*shape)
        for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            tensors[f"{prefix}mlp.{part}_proj.weight"] = matrix(*shape)
        norms = ["input", "post_attention", *(["pre_feedforward", "post_feedforward"] if gemma else [])]
        tensors.update({f"{prefix}{part}_layernorm.weight": norm(hidden) for part in norms})
        if gemma:
            tensors.update({f"{prefix}self_attn.{part}_norm.weight": norm(dim) for part in "qk"})
    return tensors


def _tokenizer() -> dict[str, Any]:
    """Byte-level BPE: token i is byte i, then the end, then pairs of letters."""
    letters = {byte: character for character, byte in byte_of_character().items()}
    merges = [[first, second] for first in "etaoins" for second in "rhlduc"]
    pieces = [*(letters[byte] for byte in range(256)), "<|end|>", *("".join(merge) for merge in merges)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end = {"id": EOS, "content": "<|end|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [{**end, "special": True}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges},
    }
