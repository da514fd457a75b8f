"""The common decoder whose dense stretches are compiled. Owns which compiled stretch a segment runs and with which weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from torch import Tensor

from brim.kernels.compiler import DenseCompiler
from brim.models.base import Segment, StepTensors
from brim.models.decoder import DecoderModel
from brim.models.dense_stretch import DenseForm, Stretch, begin_body, layer_body, plain_matrix

_Weights = tuple[Tensor | None, ...]


class CompiledDecoder(DecoderModel):
    """A DecoderModel, call by call as ever until `compile` succeeded. Its kernels must hold plain weights.

    Embedding, rotary embedding and KV write, attention and logits stay the kernels' own, outside of what is compiled; weights
    are arguments of the compiled functions, so none is copied. Intermediate results of a stretch come from torch's allocator.
    """

    def compile(self, compiler: DenseCompiler, steps: Iterable[StepTensors]) -> None:
        """Compile the dense segments and run them for each of `steps`: the largest step there can be, then one of one token.

        Whatever the compiler raises goes through, and this model goes on call by call.
        """
        segments = tuple(self._compiled_segments(compiler))
        for step in steps:
            for segment in segments:
                if not segment.is_attention:
                    segment.run(step)
        self._segments = segments

    def _compiled_segments(self, compiler: DenseCompiler) -> Iterator[Segment]:
        spec = self.spec
        form = DenseForm(spec.rms_norm_eps, spec.activation, spec.intermediate_size)
        first, last = Stretch(begin_body(form), compiler, 2), Stretch(layer_body(form), compiler, 3)
        inner = Stretch(layer_body(form), compiler, 3)
        layer = self.weights.layers[0]
        yield Segment(partial(self._run_first, first, (layer.input_norm, plain_matrix(layer.qkv), layer.qkv_bias)), False)
        for index in range(spec.num_layers):
            yield Segment(partial(self._attend, index), True)
            weights = self._weights_from(index)
            if index + 1 < spec.num_layers:
                yield Segment(partial(self._run_inner, inner, weights, index + 1), False)
            else:
                yield Segment(partial(self._run_last, last, weights), False)

    def _weights_from(self, index: int) -> _Weights:
        """Arguments of `layer_body` after the buffers."""
        layer, layers = self.weights.layers[index], self.weights.layers
        following: _Weights = (self.weights.final_norm, None, None)
        if index + 1 < len(layers):
            after = layers[index + 1]
            following = (after.input_norm, plain_matrix(after.qkv), after.qkv_bias)
        return (
            plain_matrix(layer.output), layer.output_bias, layer.post_attention_norm, layer.mlp_norm, plain_matrix(layer.gate_up),
            layer.gate_up_bias, plain_matrix(layer.down), layer.down_bias, layer.post_mlp_norm, *following,
        )  # fmt: skip

    def _run_first(self, stretch: Stretch, weights: _Weights, step: StepTensors) -> None:
        num_tokens = step.ids.shape[0]
        residual, qkv = step.buffers["residual"][:num_tokens], step.buffers["qkv"][:num_tokens]
        self._kernels.embed(step.ids, self.weights.embedding, self.spec.embedding_scale, residual)
        stretch(residual, qkv, *weights)
        self._rope_and_cache(0, step, qkv)

    def _run_inner(self, stretch: Stretch, weights: _Weights, next_index: int, step: StepTensors) -> None:
        num_tokens, buffers = step.ids.shape[0], step.buffers
        qkv = buffers["qkv"][:num_tokens]
        stretch(buffers["attention"][:num_tokens], buffers["residual"][:num_tokens], qkv, *weights)
        self._rope_and_cache(next_index, step, qkv)

    def _run_last(self, stretch: Stretch, weights: _Weights, step: StepTensors) -> None:
        attended, buffers = self._wanted_rows(step), step.buffers
        num_rows = attended.shape[0]
        if num_rows:
            stretch(attended, buffers["residual"][:num_rows], buffers["hidden"][:num_rows], *weights)
