"""The common decoder: pre-norm attention and gated MLP over kernels and static buffers. Owns the order of the calls.

    residual = embed(ids);  hidden = norm(residual)
    each layer:  qkv -> rope, cache -> attention -> output;  residual += [post norm], hidden = mlp_norm(residual)
                 gate_up -> activation -> down;              residual += [post norm], hidden = next norm(residual)

Nothing is allocated: every result goes to a prefix of a workspace buffer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from brim.config.model_spec import ModelSpec, RopeSpec
from brim.kernels.base import Kernels
from brim.layers.rotary import cos_sin_table
from brim.layers.weights import DecoderWeights, LayerWeights, allocate_weights, weights_num_bytes
from brim.models.base import BufferShape, Model, StepTensors


def decoder_buffer_shapes(spec: ModelSpec, dtype: torch.dtype) -> tuple[BufferShape, ...]:
    """Workspace of one step. Stages: 0 norm, 1 qkv, 2 attention, 3 output, 4 gate and up, 5 activation, 6 down.

    The activation is written over its gate, element by element, so no buffer of its own is alive in the widest stages.
    """
    heads, kv_heads = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return (
        BufferShape("residual", spec.hidden_size, dtype, 0, 6),
        BufferShape("hidden", spec.hidden_size, dtype, 0, 6),
        BufferShape("qkv", heads + 2 * kv_heads, dtype, 1, 2),
        BufferShape("attention", heads, dtype, 2, 3),
        BufferShape("gate_up", 2 * spec.intermediate_size, dtype, 4, 6),
    )


class DecoderModel(Model):
    """A dense decoder of any supported family; what differs between families is in its ModelSpec.

    max_positions: rows of the rotary tables, at least the longest context served.
    """

    def __init__(self, spec: ModelSpec, kernels: Kernels, dtype: torch.dtype, max_positions: int, device: torch.device) -> None:
        self.spec = spec
        self.dtype = dtype
        self.weights: DecoderWeights = allocate_weights(spec, kernels, dtype, device)
        self._kernels = kernels
        ropes = dict.fromkeys(self._layer_ropes())
        self._tables = {rope: cos_sin_table(rope, spec.head_dim, max_positions, device) for rope in ropes}
        self._layer_tables = [self._tables[rope] for rope in self._layer_ropes()]
        has_full = "full" in spec.layer_kinds
        self._layer_groups = [1 if kind == "sliding" and has_full else 0 for kind in spec.layer_kinds]
        self._query_width = spec.num_heads * spec.head_dim

    def _layer_ropes(self) -> list[RopeSpec]:
        spec = self.spec
        return [
            spec.rope_sliding if kind == "sliding" and spec.family == "gemma3" else spec.rope_full for kind in spec.layer_kinds
        ]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, layout padding included."""
        return weights_num_bytes(self.spec, self._kernels, self.dtype)

    @property
    def table_bytes(self) -> int:
        """Bytes of the rotary tables."""
        return sum(table.nbytes for table in self._tables.values())

    def buffer_shapes(self) -> Iterable[BufferShape]:
        """See decoder_buffer_shapes."""
        return decoder_buffer_shapes(self.spec, self.dtype)

    def forward(self, step: StepTensors) -> Tensor:
        """Final-normed hidden states [T, hidden_size]."""
        kernels, spec, weights = self._kernels, self.spec, self.weights
        num_tokens = step.ids.shape[0]
        residual = step.buffers["residual"][:num_tokens]
        hidden = step.buffers["hidden"][:num_tokens]
        kernels.embed(step.ids, weights.embedding, spec.embedding_scale, residual)
        kernels.rms_norm(residual, weights.layers[0].input_norm, spec.rms_norm_eps, hidden)
        last = len(weights.layers) - 1
        for index, layer in enumerate(weights.layers):
            next_norm = weights.final_norm if index == last else weights.layers[index + 1].input_norm
            self._attention(step, index, layer, hidden)
            kernels.add_rms_norm(hidden, residual, layer.mlp_norm, spec.rms_norm_eps, hidden, layer.post_attention_norm)
            self._mlp(step, layer, hidden)
            kernels.add_rms_norm(hidden, residual, next_norm, spec.rms_norm_eps, hidden, layer.post_mlp_norm)
        return hidden

    def _attention(self, step: StepTensors, index: int, layer: LayerWeights, hidden: Tensor) -> None:
        kernels, spec = self._kernels, self.spec
        num_tokens = hidden.shape[0]
        qkv = step.buffers["qkv"][:num_tokens]
        attended = step.buffers["attention"][:num_tokens]
        batch = step.batches[self._layer_groups[index]]
        cache = step.kv_caches[index]
        kernels.linear(hidden, layer.qkv, qkv, layer.qkv_bias)
        kernels.rope_and_cache(
            qkv,
            step.positions,
            self._layer_tables[index],
            cache,
            batch.slot_mapping,
            spec.num_heads,
            layer.q_norm,
            layer.k_norm,
            spec.rms_norm_eps,
        )
        queries = qkv[:, : self._query_width]
        kernels.attention(queries, cache, batch, spec.attention_scale, spec.attention_softcap, attended)
        kernels.linear(attended, layer.output, hidden, layer.output_bias)

    def _mlp(self, step: StepTensors, layer: LayerWeights, hidden: Tensor) -> None:
        kernels = self._kernels
        num_tokens = hidden.shape[0]
        gate_up = step.buffers["gate_up"][:num_tokens]
        activated = gate_up[:, : self.spec.intermediate_size]
        kernels.linear(hidden, layer.gate_up, gate_up, layer.gate_up_bias)
        kernels.gated_activation(gate_up, activated, self.spec.activation)
        kernels.linear(activated, layer.down, hidden, layer.down_bias)

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """out[R, vocab] float32."""
        self._kernels.linear(hidden, self.weights.lm_head, out)
        cap = self.spec.logit_softcap
        if cap:
            out.div_(cap).tanh_().mul_(cap)
