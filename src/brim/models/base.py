"""The model contract: what the worker needs of any model. Owns the abstract class and the step's tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brim.config.model_spec import ModelSpec
from brim.kernels.base import AttentionBatch
from brim.memory.workspace import BufferSpec


@dataclass(frozen=True, slots=True)
class StepTensors:
    """Inputs of one forward pass: views of static buffers, T tokens.

    ids [T] int64, positions [T] int64, batches: one AttentionBatch a KV group, kv_caches: one strided view a layer
    [num_blocks, 2, B, K, D], buffers: name -> workspace view whose first dimension holds at least T rows.
    wanted [R] int64: rows of the T whose hidden states are asked for, padded with any; may be empty. None: all of them.
    wanted_batches: the wanted rows that are real as a step of one token each, where they are the last ones of their sequences.
    """

    ids: Tensor
    positions: Tensor
    batches: Sequence[AttentionBatch]
    kv_caches: Sequence[Tensor]
    buffers: Mapping[str, Tensor]
    wanted: Tensor | None = None
    wanted_batches: Sequence[AttentionBatch] | None = None

    @property
    def num_wanted(self) -> int:
        """R, or T where all rows are asked for."""
        return len(self.ids if self.wanted is None else self.wanted)


@dataclass(frozen=True, slots=True)
class BufferShape:
    """A workspace buffer [max_tokens, width] of `dtype`, alive between two stages (see memory.workspace)."""

    name: str
    width: int
    dtype: torch.dtype
    first_use: int
    last_use: int

    def spec(self, max_tokens: int) -> BufferSpec:
        """Its bytes at max_tokens rows."""
        return BufferSpec(self.name, max_tokens * self.width * self.dtype.itemsize, self.first_use, self.last_use)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the forward pass between two attention calls, or one attention call.

    A dense segment depends on the number of tokens alone, so it can be captured as a graph that serves every batch of that many.
    """

    run: Callable[[StepTensors], None]
    is_attention: bool


class Model(ABC):
    """A decoder-only language model over `Kernels`. Weight storage exists from construction; `load` fills it."""

    spec: ModelSpec
    dtype: torch.dtype
    device: torch.device

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of all weights, layout padding included."""

    @property
    @abstractmethod
    def table_bytes(self) -> int:
        """Bytes of constant tables (rotary cos/sin)."""

    @abstractmethod
    def buffer_shapes(self) -> Iterable[BufferShape]:
        """Temporaries of forward(); the result lives in the buffer named "hidden" (alive to the last stage)."""

    def close(self) -> None:  # noqa: B027  (nothing to forget is a fine default)
        """The model runs no more; its memory goes with the last reference to it."""

    @property
    @abstractmethod
    def segments(self) -> Sequence[Segment]:
        """The forward pass in order, dense segments and attention calls by turns."""

    def forward(self, step: StepTensors) -> Tensor:
        """Final-normed hidden states [T or, where rows are wanted, R, hidden_size], a view of the workspace buffer "hidden"."""
        for segment in self.segments:
            segment.run(step)
        return step.buffers["hidden"][: step.num_wanted]

    @abstractmethod
    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """out[R, vocab] float32 from hidden rows [R, hidden_size]; soft-capping included."""
