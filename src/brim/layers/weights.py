"""The weights of a decoder. Owns their storage and how many bytes it takes; who fills them is `models.loader`'s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from brim.config.model_spec import ModelSpec
from brim.formats.ggml_type import GGMLType
from brim.kernels.base import Kernels, LinearWeight, StoredRows
from brim.kernels.planned import KernelFacts

FLOAT_BYTES = 4
# stored matrices that stay quantised as in their file, by our name ("layers.3.q"), and their blocks; others get the model's dtype
KeptBlocks = Mapping[str, GGMLType]
NO_BLOCKS: KeptBlocks = MappingProxyType({})


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


@dataclass(frozen=True, slots=True)
class MatrixShape:
    """A matrix and the stored tensors it is made of, one below the other: (name, rows) as in `models.slots`."""

    in_features: int
    parts: tuple[tuple[str, int], ...]

    def stored_rows(self, kept: KeptBlocks, prefix: str = "") -> tuple[StoredRows, ...]:
        """How each part is kept."""
        return tuple(StoredRows(rows, kept.get(prefix + name)) for name, rows in self.parts)


def layer_matrices(spec: ModelSpec) -> dict[str, MatrixShape]:
    """The matrices of one layer, by field of LayerWeights."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    heads, kv_heads = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return {
        "qkv": MatrixShape(hidden, (("q", heads), ("k", kv_heads), ("v", kv_heads))),
        "output": MatrixShape(heads, (("output", hidden),)),
        "gate_up": MatrixShape(hidden, (("gate", inner), ("up", inner))),
        "down": MatrixShape(inner, (("down", hidden),)),
    }


def embedding_matrices(spec: ModelSpec) -> dict[str, MatrixShape]:
    """The embedding, and the LM head where it is not the embedding."""
    names = ("embedding",) if spec.tie_word_embeddings else ("embedding", "lm_head")
    return {name: MatrixShape(spec.hidden_size, ((name, spec.vocab_size),)) for name in names}


def allocate_weights(
    spec: ModelSpec, kernels: Kernels, dtype: torch.dtype, device: torch.device, kept: KeptBlocks = NO_BLOCKS
) -> DecoderWeights:
    """Storage for every weight, not filled yet (norms and biases are NaN so that a gap shows). kept: see KeptBlocks."""

    def vector(size: int, wanted: bool = True) -> Tensor | None:
        return torch.full((size,), float("nan"), dtype=torch.float32, device=device) if wanted else None

    def norm(size: int) -> Tensor:
        return torch.full((size,), float("nan"), dtype=torch.float32, device=device)

    def matrix(shape: MatrixShape, prefix: str = "") -> LinearWeight:
        return kernels.new_stored_linear(shape.stored_rows(kept, prefix), shape.in_features, dtype)

    kernels.reserve_weights(matrices_num_bytes(spec, kernels, dtype, kept))
    hidden, inner, dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
    qkv_size = (spec.num_heads + 2 * spec.num_kv_heads) * dim
    shapes = layer_matrices(spec)
    layers = tuple(
        LayerWeights(
            input_norm=norm(hidden),
            qkv=matrix(shapes["qkv"], f"layers.{index}."),
            qkv_bias=vector(qkv_size, spec.attention_bias),
            q_norm=vector(dim, spec.qk_norm),
            k_norm=vector(dim, spec.qk_norm),
            output=matrix(shapes["output"], f"layers.{index}."),
            output_bias=vector(hidden, spec.output_bias),
            post_attention_norm=vector(hidden, spec.sandwich_norms),
            mlp_norm=norm(hidden),
            gate_up=matrix(shapes["gate_up"], f"layers.{index}."),
            gate_up_bias=vector(2 * inner, spec.mlp_bias),
            down=matrix(shapes["down"], f"layers.{index}."),
            down_bias=vector(hidden, spec.mlp_bias),
            post_mlp_norm=vector(hidden, spec.sandwich_norms),
        )
        for index in range(spec.num_layers)
    )
    ends = {name: matrix(shape) for name, shape in embedding_matrices(spec).items()}
    return DecoderWeights(ends["embedding"], layers, norm(hidden), ends.get("lm_head", ends["embedding"]))


def matrix_num_bytes(name: str, spec: ModelSpec, kernels: KernelFacts, dtype: torch.dtype, kept: KeptBlocks = NO_BLOCKS) -> int:
    """One of `embedding_matrices`."""
    shape = embedding_matrices(spec)[name]
    return kernels.stored_num_bytes(shape.stored_rows(kept), shape.in_features, dtype)


def weights_num_bytes(spec: ModelSpec, kernels: KernelFacts, dtype: torch.dtype, kept: KeptBlocks = NO_BLOCKS) -> int:
    """What `allocate_weights` holds, layout padding included, computed without allocating."""
    hidden, inner, dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
    heads, kv_heads = spec.num_heads * dim, spec.num_kv_heads * dim
    floats = hidden * (4 if spec.sandwich_norms else 2) + 2 * dim * spec.qk_norm
    floats += (heads + 2 * kv_heads) * spec.attention_bias + hidden * spec.output_bias + (2 * inner + hidden) * spec.mlp_bias
    return matrices_num_bytes(spec, kernels, dtype, kept) + FLOAT_BYTES * (spec.num_layers * floats + hidden)


def matrices_num_bytes(spec: ModelSpec, kernels: KernelFacts, dtype: torch.dtype, kept: KeptBlocks = NO_BLOCKS) -> int:
    """The matrices alone, embeddings included."""
    prefixed = [(f"layers.{index}.", shape) for index in range(spec.num_layers) for shape in layer_matrices(spec).values()]
    in_layers = sum(kernels.stored_num_bytes(shape.stored_rows(kept, name), shape.in_features, dtype) for name, shape in prefixed)
    return in_layers + sum(matrix_num_bytes(name, spec, kernels, dtype, kept) for name in embedding_matrices(spec))
