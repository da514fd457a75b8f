"""A model of a real shape that computes nothing. Owns what kinds of work its forward pass is, and that its weights take memory.

As many segments as the real decoder has, so that as many graphs are captured; each says what work it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from brim.config.model_spec import ModelSpec
from brim.kernels.base import Kernels
from brim.kernels.scripted import HearsWork
from brim.layers.weights import weights_num_bytes
from brim.memory.step_memory import rotary_table_bytes
from brim.models.base import BufferShape, Model, Segment, StepTensors
from brim.models.decoder import decoder_buffer_shapes


class ScriptedModel(Model):
    """allocate(num_bytes) takes memory on the device for as long as what it returns lives; num_ranks: each pass ends in a
    collective where there are several."""

    def __init__(
        self,
        spec: ModelSpec,
        kernels: Kernels,
        dtype: torch.dtype,
        max_positions: int,
        device: torch.device,
        hears: HearsWork,
        allocate: Callable[[int], object],
        num_ranks: int = 1,
    ) -> None:
        self.spec, self.dtype, self.device = spec, dtype, device
        self._hears, self._num_ranks = hears, num_ranks
        self._weight_bytes = weights_num_bytes(spec, kernels, dtype)
        self._table_bytes = rotary_table_bytes(spec, max_positions)
        self._memory = [allocate(self._weight_bytes), allocate(self._table_bytes)]
        dense, attention = Segment(self._dense, False), Segment(self._attend, True)
        last = Segment(self._attend_wanted, True), Segment(self._dense_wanted, False)
        self._segments = (Segment(self._begin, False), *(attention, dense) * (spec.num_layers - 1), *last)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self._weight_bytes

    @property
    def table_bytes(self) -> int:
        """Bytes of the rotary tables."""
        return self._table_bytes

    def buffer_shapes(self) -> Iterable[BufferShape]:
        """The real decoder's."""
        return decoder_buffer_shapes(self.spec, self.dtype)

    @property
    def segments(self) -> Sequence[Segment]:
        """Dense work and attention by turns."""
        return self._segments

    def close(self) -> None:
        """Weights are given back."""
        self._memory.clear()

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """One product."""
        self._hears.work("matmul", hidden.shape[0])

    def _begin(self, step: StepTensors) -> None:
        tokens = step.ids.shape[0]
        self._hears.work("step", tokens)
        if step.batches[0].max_query_len > 1:
            self._hears.work("prefill", tokens)
        self._hears.work("matmul", tokens)

    def _attend(self, step: StepTensors) -> None:
        self._hears.work("attention", step.ids.shape[0])

    def _attend_wanted(self, step: StepTensors) -> None:
        if step.num_wanted:
            self._attend(step)

    def _dense(self, step: StepTensors) -> None:
        self._work_on(step.ids.shape[0])

    def _dense_wanted(self, step: StepTensors) -> None:
        if step.num_wanted:
            self._work_on(step.num_wanted)

    def _work_on(self, num_rows: int) -> None:
        self._hears.work("matmul", num_rows)
        if self._num_ranks > 1:
            self._hears.work("collective", num_rows)
