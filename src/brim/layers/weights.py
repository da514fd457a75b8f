"""The weights of a decoder. Owns their storage and how many bytes it takes; who fills them is `models.loader`'s."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from brim.config.model_spec import ModelSpec
from brim.kernels.base import Kernels, LinearWeight
from brim.kernels.planned import KernelFacts

FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One transformer block. Norm weights and biases are float32; None where the architecture has none.

    qkv [(H + 2K) * D, hidden], gate_up [2 * intermediate, hidden]. mlp_norm is what Llama calls post_attention_layernorm and
    Gemma pre_feedforward_layernorm; post_* are Gemma's sandwich norms.
    """

    input_norm: Tensor
    qkv: LinearWeight
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: LinearWeight
    output_bias: Tensor | None
    post_attention_norm: Tensor | None
    mlp_norm: Tensor
    gate_up: LinearWeight
    gate_up_bias: Tensor | None
    down: LinearWeight
    down_bias: Tensor | None
    post_mlp_norm: Tensor | None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights; lm_head is the embedding itself where they are tied."""

    embedding: LinearWeight
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    lm_head: LinearWeight


def allocate_weights(spec: ModelSpec, kernels: Kernels, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """Storage for every weight, not filled yet (norms and biases are NaN so that a gap shows)."""

    def vector(size: int, wanted: bool = True) -> Tensor | None:
        return torch.full((size,), float("nan"), dtype=torch.float32, device=device) if wanted else None

    def norm(size: int) -> Tensor:
        return torch.full((size,), float("nan"), dtype=torch.float32, device=device)

    kernels.reserve_weights(matrices_num_bytes(spec, kernels, dtype))
    hidden, inner, dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
    qkv_size = (spec.num_heads + 2 * spec.num_kv_heads) * dim
    layers = tuple(
        LayerWeights(
            input_norm=norm(hidden),
            qkv=kernels.new_linear(qkv_size, hidden, dtype),
            qkv_bias=vector(qkv_size, spec.attention_bias),
            q_norm=vector(dim, spec.qk_norm),
            k_norm=vector(dim, spec.qk_norm),
            output=kernels.new_linear(hidden, spec.num_heads * dim, dtype),
            output_bias=vector(hidden, spec.output_bias),
            post_attention_norm=vector(hidden, spec.sandwich_norms),
            mlp_norm=norm(hidden),
            gate_up=kernels.new_linear(2 * inner, hidden, dtype),
            gate_up_bias=vector(2 * inner, spec.mlp_bias),
            down=kernels.new_linear(hidden, inner, dtype),
            down_bias=vector(hidden, spec.mlp_bias),
            post_mlp_norm=vector(hidden, spec.sandwich_norms),
        )
        for _ in range(spec.num_layers)
    )
    embedding = kernels.new_linear(spec.vocab_size, hidden, dtype)
    lm_head = embedding if spec.tie_word_embeddings else kernels.new_linear(spec.vocab_size, hidden, dtype)
    return DecoderWeights(embedding, layers, norm(hidden), lm_head)


def weights_num_bytes(spec: ModelSpec, kernels: KernelFacts, dtype: torch.dtype) -> int:
    """What `allocate_weights` holds, layout padding included, computed without allocating."""
    hidden, inner, dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
    heads, kv_heads = spec.num_heads * dim, spec.num_kv_heads * dim
    floats = hidden * (4 if spec.sandwich_norms else 2) + 2 * dim * spec.qk_norm
    floats += (heads + 2 * kv_heads) * spec.attention_bias + hidden * spec.output_bias + (2 * inner + hidden) * spec.mlp_bias
    return matrices_num_bytes(spec, kernels, dtype) + FLOAT_BYTES * (spec.num_layers * floats + hidden)


def matrices_num_bytes(spec: ModelSpec, kernels: KernelFacts, dtype: torch.dtype) -> int:
    """The matrices alone, embeddings included."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    heads, kv_heads = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    matrices = ((heads + 2 * kv_heads, hidden), (hidden, heads), (2 * inner, hidden), (hidden, inner))
    layer_bytes = sum(kernels.linear_num_bytes(rows, cols, dtype) for rows, cols in matrices)
    embeddings = 1 if spec.tie_word_embeddings else 2
    return spec.num_layers * layer_bytes + embeddings * kernels.linear_num_bytes(spec.vocab_size, hidden, dtype)
