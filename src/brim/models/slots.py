"""Where a stored tensor belongs. Owns the names that Hugging Face and GGUF files use, and the slots they fill.

A slot is a part of a weight: rows first_row .. first_row + rows of a matrix, or a whole vector.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from brim.config.model_spec import ModelSpec
from brim.kernels.base import LinearWeight
from brim.layers.weights import DecoderWeights, LayerWeights


@dataclass(frozen=True, slots=True)
class Slot:
    """Target of one stored tensor. permuted_heads: GGUF keeps q and k of Llama models for interleaved rope; their heads."""

    name: str
    rows: int
    cols: int
    matrix: LinearWeight | None = None
    vector: Tensor | None = None
    first_row: int = 0
    plus_one: bool = False
    permuted_heads: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape the stored tensor must have."""
        return (self.rows, self.cols) if self.matrix is not None else (self.rows,)


_HF_LAYER = {
    "input_layernorm.weight": "input_norm",
    "self_attn.q_proj.weight": "q",
    "self_attn.k_proj.weight": "k",
    "self_attn.v_proj.weight": "v",
    "self_attn.q_proj.bias": "q_bias",
    "self_attn.k_proj.bias": "k_bias",
    "self_attn.v_proj.bias": "v_bias",
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
    "self_attn.o_proj.weight": "output",
    "self_attn.o_proj.bias": "output_bias",
    "post_attention_layernorm.weight": "mlp_norm",
    "mlp.gate_proj.weight": "gate",
    "mlp.up_proj.weight": "up",
    "mlp.down_proj.weight": "down",
    "mlp.gate_proj.bias": "gate_bias",
    "mlp.up_proj.bias": "up_bias",
    "mlp.down_proj.bias": "down_bias",
}
_HF_SANDWICH = {
    "post_attention_layernorm.weight": "post_attention_norm",
    "pre_feedforward_layernorm.weight": "mlp_norm",
    "post_feedforward_layernorm.weight": "post_mlp_norm",
}
_HF_TOP = {"embed_tokens.weight": "embedding", "norm.weight": "final_norm", "lm_head.weight": "lm_head"}
_GGUF_LAYER = {
    "attn_norm.weight": "input_norm",
    "attn_q.weight": "q",
    "attn_k.weight": "k",
    "attn_v.weight": "v",
    "attn_q.bias": "q_bias",
    "attn_k.bias": "k_bias",
    "attn_v.bias": "v_bias",
    "attn_q_norm.weight": "q_norm",
    "attn_k_norm.weight": "k_norm",
    "attn_output.weight": "output",
    "attn_output.bias": "output_bias",
    "post_attention_norm.weight": "post_attention_norm",
    "ffn_norm.weight": "mlp_norm",
    "ffn_gate.weight": "gate",
    "ffn_up.weight": "up",
    "ffn_down.weight": "down",
    "post_ffw_norm.weight": "post_mlp_norm",
}
_GGUF_TOP = {"token_embd.weight": "embedding", "output_norm.weight": "final_norm", "output.weight": "lm_head"}
_LAYER_NAME = re.compile(r"(?:layers|blk)\.(\d+)\.(.+)")
_HF_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
_IGNORED = re.compile(
    r"rotary_emb\.inv_freq|rope_freqs\.weight|vision_tower|multi_modal_projector|vision_model|audio_tower|embed_vision"
)


def slot_name(stored_name: str, spec: ModelSpec, *, is_gguf: bool) -> str | None:
    """Our name ("layers.3.q", "embedding") of a stored tensor; None where it is to be ignored, "" where it is unknown."""
    if _IGNORED.search(stored_name) or (spec.tie_word_embeddings and stored_name.endswith("lm_head.weight")):
        return None
    name = stored_name
    if not is_gguf:
        prefix = next((p for p in _HF_PREFIXES if name.startswith(p)), "")
        name = name.removeprefix(prefix)
    top = _GGUF_TOP if is_gguf else _HF_TOP
    if name in top:
        return top[name]
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        return ""
    table = _GGUF_LAYER if is_gguf else {**_HF_LAYER, **(_HF_SANDWICH if spec.sandwich_norms else {})}
    part = table.get(match.group(2))
    return f"layers.{match.group(1)}.{part}" if part else ""


def build_slots(weights: DecoderWeights, spec: ModelSpec, *, is_gguf: bool) -> dict[str, Slot]:
    """Every slot that must be filled exactly once, by our name."""
    slots: dict[str, Slot] = {}
    plus_one = spec.norm_plus_one and not is_gguf
    for index, layer in enumerate(weights.layers):
        for slot in _layer_slots(layer, spec, plus_one=plus_one, permuted=is_gguf and spec.family in ("llama", "mistral")):
            slots[f"layers.{index}.{slot.name}"] = slot
    hidden, vocab = spec.hidden_size, spec.vocab_size
    slots["embedding"] = Slot("embedding", vocab, hidden, matrix=weights.embedding)
    slots["final_norm"] = Slot("final_norm", hidden, 1, vector=weights.final_norm, plus_one=plus_one)
    if not spec.tie_word_embeddings:
        slots["lm_head"] = Slot("lm_head", vocab, hidden, matrix=weights.lm_head)
    return slots


def _layer_slots(layer: LayerWeights, spec: ModelSpec, *, plus_one: bool, permuted: bool) -> list[Slot]:
    hidden, inner, dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
    heads, kv = spec.num_heads * dim, spec.num_kv_heads * dim
    q_heads, k_heads = (spec.num_heads, spec.num_kv_heads) if permuted else (0, 0)
    slots = [
        Slot("q", heads, hidden, matrix=layer.qkv, permuted_heads=q_heads),
        Slot("k", kv, hidden, matrix=layer.qkv, first_row=heads, permuted_heads=k_heads),
        Slot("v", kv, hidden, matrix=layer.qkv, first_row=heads + kv),
        Slot("output", hidden, heads, matrix=layer.output),
        Slot("gate", inner, hidden, matrix=layer.gate_up),
        Slot("up", inner, hidden, matrix=layer.gate_up, first_row=inner),
        Slot("down", hidden, inner, matrix=layer.down),
    ]
    norms = {
        "input_norm": layer.input_norm,
        "q_norm": layer.q_norm,
        "k_norm": layer.k_norm,
        "post_attention_norm": layer.post_attention_norm,
        "mlp_norm": layer.mlp_norm,
        "post_mlp_norm": layer.post_mlp_norm,
    }
    slots += [Slot(name, len(v), 1, vector=v, plus_one=plus_one) for name, v in norms.items() if v is not None]
    if layer.qkv_bias is not None:
        slots.append(Slot("q_bias", heads, 1, vector=layer.qkv_bias[:heads], permuted_heads=q_heads))
        slots.append(Slot("k_bias", kv, 1, vector=layer.qkv_bias[heads : heads + kv], permuted_heads=k_heads))
        slots.append(Slot("v_bias", kv, 1, vector=layer.qkv_bias[heads + kv :]))
    if layer.gate_up_bias is not None:
        slots.append(Slot("gate_bias", inner, 1, vector=layer.gate_up_bias[:inner]))
        slots.append(Slot("up_bias", inner, 1, vector=layer.gate_up_bias[inner:]))
    biases = {"output_bias": layer.output_bias, "down_bias": layer.down_bias}
    slots += [Slot(name, len(v), 1, vector=v) for name, v in biases.items() if v is not None]
    return slots
