"""The common decoder: pre-norm attention and gated MLP over kernels and static buffers. Owns the order of the calls.

    residual = embed(ids);  hidden = norm(residual)
    each layer:  qkv -> rope, cache -> attention -> output;  residual += [post norm], hidden = mlp_norm(residual)
                 gate_up -> activation -> down;              residual += [post norm], hidden = next norm(residual)

What follows the last attention is computed for the wanted rows only: nothing else reads it.
Nothing is allocated: every result goes to a prefix of a workspace buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from brim.config.model_spec import ModelSpec, RopeSpec
from brim.kernels.base import FoldedNorm, Kernels
from brim.layers.rotary import cos_sin_table
from brim.layers.weights import NO_BLOCKS, DecoderWeights, KeptBlocks, LayerWeights, allocate_weights, weights_num_bytes
from brim.memory.step_memory import decoder_widths
from brim.models.base import BufferShape, Model, Segment, StepTensors


def decoder_buffer_shapes(spec: ModelSpec, dtype: torch.dtype) -> tuple[BufferShape, ...]:
    """Workspace of one step: `step_memory.decoder_widths` in this dtype."""
    return tuple(BufferShape(name, width, dtype, first, last) for name, width, first, last in decoder_widths(spec))


class DecoderModel(Model):
    """A dense decoder of any supported family; what differs between families is in its ModelSpec.

    max_positions: rows of the rotary tables, at least the longest context served. kept: the matrices that stay quantised.
    """

    def __init__(
        self,
        spec: ModelSpec,
        kernels: Kernels,
        dtype: torch.dtype,
        max_positions: int,
        device: torch.device,
        kept: KeptBlocks = NO_BLOCKS,
    ) -> None:
        self.spec = spec
        self.dtype = dtype
        self.device = device
        self.weights: DecoderWeights = allocate_weights(spec, kernels, dtype, device, kept)
        self._kernels, self._kept = kernels, kept
        ropes = dict.fromkeys(self._layer_ropes())
        self._tables = {rope: cos_sin_table(rope, spec.head_dim, max_positions, device) for rope in ropes}
        self._layer_tables = [self._tables[rope] for rope in self._layer_ropes()]
        has_full = "full" in spec.layer_kinds
        self._layer_groups = [1 if kind == "sliding" and has_full else 0 for kind in spec.layer_kinds]
        self._query_width = spec.num_heads * spec.head_dim
        self._fused_rows = kernels.fused_rows(spec, dtype) if _can_fuse(spec) else 0
        self._segments: tuple[Segment, ...] = tuple(self._build_segments())

    def _layer_ropes(self) -> list[RopeSpec]:
        spec = self.spec
        return [
            spec.rope_sliding if kind == "sliding" and spec.family == "gemma3" else spec.rope_full for kind in spec.layer_kinds
        ]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, layout padding included."""
        return weights_num_bytes(self.spec, self._kernels, self.dtype, self._kept)

    @property
    def table_bytes(self) -> int:
        """Bytes of the rotary tables."""
        return sum(table.nbytes for table in self._tables.values())

    def buffer_shapes(self) -> Iterable[BufferShape]:
        """See decoder_buffer_shapes."""
        return decoder_buffer_shapes(self.spec, self.dtype)

    @property
    def segments(self) -> Sequence[Segment]:
        """Dense work up to the first attention call, that call, dense work up to the next one, and so on."""
        return self._segments

    def close(self) -> None:
        """Forget the segments: they hold this model, and memory in a cycle is given back late or never."""
        self._segments = ()

    def _build_segments(self) -> Iterator[Segment]:
        yield Segment(self._begin, False)
        for index in range(self.spec.num_layers):
            yield Segment(partial(self._attend, index), True)
            yield Segment(partial(self._after_attention, index), False)

    def _begin(self, step: StepTensors) -> None:
        num_tokens = step.ids.shape[0]
        residual = step.buffers["residual"][:num_tokens]
        hidden = step.buffers["hidden"][:num_tokens]
        self._kernels.embed(step.ids, self.weights.embedding, self.spec.embedding_scale, residual)
        norm, eps = self.weights.layers[0].input_norm, self.spec.rms_norm_eps
        if num_tokens == 1 and self._fused_rows:  # several rows would need a product before their norm
            self._norm_and_qkv(0, step, FoldedNorm(residual, norm, eps, hidden))
            return
        self._kernels.rms_norm(residual, norm, eps, hidden)
        self._before_attention(0, step, hidden)

    def _norm_and_qkv(self, index: int, step: StepTensors, norm: FoldedNorm) -> None:
        qkv = step.buffers["qkv"][: norm.residual.shape[0]]
        self._kernels.norm_linear(norm, self.weights.layers[index].qkv, qkv)
        self._rope_and_cache(index, step, qkv)

    def _before_attention(self, index: int, step: StepTensors, hidden: Tensor) -> None:
        kernels, layer = self._kernels, self.weights.layers[index]
        qkv = step.buffers["qkv"][: hidden.shape[0]]
        kernels.linear(hidden, layer.qkv, qkv, layer.qkv_bias)
        self._rope_and_cache(index, step, qkv)

    def _rope_and_cache(self, index: int, step: StepTensors, qkv: Tensor) -> None:
        spec, layer = self.spec, self.weights.layers[index]
        self._kernels.rope_and_cache(
            qkv,
            step.positions,
            self._layer_tables[index],
            step.kv_caches[index],
            step.batches[self._layer_groups[index]].slot_mapping,
            spec.num_heads,
            layer.q_norm,
            layer.k_norm,
            spec.rms_norm_eps,
        )

    def _attend(self, index: int, step: StepTensors) -> None:
        if self._is_last(index) and not step.num_wanted:
            return
        num_tokens, spec, group = step.ids.shape[0], self.spec, self._layer_groups[index]
        queries = step.buffers["qkv"][:num_tokens, : self._query_width]
        attended, batch = step.buffers["attention"][:num_tokens], step.batches[group]
        if self._is_last(index) and step.wanted is not None and step.wanted_batches is not None:
            batch, num_rows = step.wanted_batches[group], step.num_wanted
            gathered = attended[num_rows : 2 * num_rows]
            self._kernels.gather_rows(queries, step.wanted, gathered)
            queries, attended = gathered[: batch.num_seqs], attended[: batch.num_seqs]
        self._kernels.attention(queries, step.kv_caches[index], batch, spec.attention_scale, spec.attention_softcap, attended)

    def _after_attention(self, index: int, step: StepTensors) -> None:
        """Output projection and MLP of a layer, the norm after them, and the next layer up to its attention."""
        kernels, eps, weights = self._kernels, self.spec.rms_norm_eps, self.weights
        is_last, layer = self._is_last(index), weights.layers[index]
        attended = self._wanted_rows(step) if is_last else step.buffers["attention"][: step.ids.shape[0]]
        num_tokens = attended.shape[0]
        if not num_tokens:
            return
        residual, hidden = step.buffers["residual"][:num_tokens], step.buffers["hidden"][:num_tokens]
        next_norm = weights.final_norm if is_last else weights.layers[index + 1].input_norm
        if num_tokens <= self._fused_rows:
            mlp, following = (FoldedNorm(residual, weight, eps, hidden) for weight in (layer.mlp_norm, next_norm))
            self._fused_after_attention(step, layer, attended, mlp, following)
            if is_last:
                kernels.rms_norm(residual, next_norm, eps, hidden)
            else:
                self._norm_and_qkv(index + 1, step, following)
            return
        kernels.linear(attended, layer.output, hidden, layer.output_bias)
        kernels.add_rms_norm(hidden, residual, layer.mlp_norm, eps, hidden, layer.post_attention_norm)
        self._mlp(step, layer, hidden)
        kernels.add_rms_norm(hidden, residual, next_norm, eps, hidden, layer.post_mlp_norm)
        if not is_last:
            self._before_attention(index + 1, step, hidden)

    def _is_last(self, index: int) -> bool:
        return index + 1 == self.spec.num_layers

    def _wanted_rows(self, step: StepTensors) -> Tensor:
        """What the last attention left for the wanted rows [R, H*D]; their residual moves to the first R rows.

        The attention's goes where qkv was, the residual's through "hidden": neither is read again before it is written."""
        attended, residual = step.buffers["attention"][: len(step.ids)], step.buffers["residual"][: len(step.ids)]
        if step.wanted is None:
            return attended
        num_rows, width = len(step.wanted), self._query_width
        kept, moved = step.buffers["qkv"].view(-1)[: num_rows * width].view(num_rows, width), step.buffers["hidden"][:num_rows]
        if step.wanted_batches is not None:
            kept = attended[:num_rows]  # attention ran for those rows alone
        elif num_rows:
            self._kernels.gather_rows(attended, step.wanted, kept)
        if num_rows:
            self._kernels.gather_rows(residual, step.wanted, moved)
            residual[:num_rows].copy_(moved)
        return kept

    def _fused_after_attention(
        self, step: StepTensors, layer: LayerWeights, attended: Tensor, mlp: FoldedNorm, following: FoldedNorm
    ) -> None:
        """Output projection and MLP of a small step: norms, activation and sums are part of the products."""
        kernels = self._kernels
        activated = step.buffers["gate_up"][: attended.shape[0], : self.spec.intermediate_size]
        kernels.add_linear(attended, layer.output, mlp)
        kernels.norm_gated_linear(mlp, layer.gate_up, self.spec.activation, activated)
        kernels.add_linear(activated, layer.down, following)

    def _mlp(self, step: StepTensors, layer: LayerWeights, hidden: Tensor) -> None:
        kernels = self._kernels
        num_tokens = hidden.shape[0]
        gate_up = step.buffers["gate_up"][:num_tokens]
        activated = gate_up[:, : self.spec.intermediate_size]
        kernels.gated_linear(hidden, layer.gate_up, gate_up, activated, self.spec.activation, layer.gate_up_bias)
        kernels.linear(activated, layer.down, hidden, layer.down_bias)

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """out[R, vocab] float32."""
        self._kernels.linear(hidden, self.weights.lm_head, out)
        cap = self.spec.logit_softcap
        if cap:
            out.div_(cap).tanh_().mul_(cap)


def _can_fuse(spec: ModelSpec) -> bool:
    """Whether products can take in what surrounds them: there is no bias, and no norm between a product and its sum."""
    return not (spec.attention_bias or spec.output_bias or spec.mlp_bias or spec.sandwich_norms)
