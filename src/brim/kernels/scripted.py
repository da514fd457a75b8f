"""Kernels that compute nothing and say what they would have computed. Owns which kind of work each call is.

For scripted devices: every call has the real signature, so a start goes through the same code; who hears of the work decides what
memory it takes.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from brim.kernels.base import Activation, AttentionBatch, FedStep, HostFeed, Kernels, LinearWeight, SamplingBatch
from brim.platforms.scenario import Work


class HearsWork(Protocol):
    """Whoever is told."""

    def work(self, kind: Work, rows: int = 1) -> None: ...


class ScriptedKernels(Kernels):
    """can_capture as on accelerators whose kernels allocate nothing."""

    name = "scripted"
    can_capture = True

    def __init__(self, hears: HearsWork) -> None:
        self._hears = hears

    def start_libraries(self) -> None:
        """A product."""
        self._hears.work("matmul")

    def new_linear(self, out_features: int, in_features: int, dtype: torch.dtype) -> LinearWeight:
        """Never called: a scripted model has no matrices."""
        raise NotImplementedError("a scripted model has no matrices")

    def linear_num_bytes(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Plain, without padding."""
        return out_features * in_features * dtype.itemsize

    def linear(self, x: Tensor, weight: LinearWeight, out: Tensor, bias: Tensor | None = None) -> None:
        """A product."""
        self._hears.work("matmul", x.shape[0])

    def embed(self, ids: Tensor, weight: LinearWeight, scale: float, out: Tensor) -> None:
        """Nothing of interest."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        """Nothing of interest."""

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, post_weight: Tensor | None = None
    ) -> None:
        """Nothing of interest."""

    def gated_activation(self, gate_up: Tensor, out: Tensor, activation: Activation) -> None:
        """Nothing of interest."""

    def gather_rows(self, x: Tensor, rows: Tensor, out: Tensor) -> None:
        """Nothing of interest."""

    def resolve_ids(self, ids: Tensor, rows: Tensor, last_ids: Tensor) -> None:
        """Nothing of interest."""

    def remember_ids(self, ids: Tensor, rows: Tensor, last_ids: Tensor) -> None:
        """Nothing of interest."""

    def begin_decodes(self, feed: HostFeed, step: FedStep) -> None:
        """Nothing of interest."""

    def end_decodes(self, feed: HostFeed, step: FedStep, hidden: Tensor, ids: Tensor) -> None:
        """Nothing of interest."""

    def rope_and_cache(
        self,
        qkv: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        num_heads: int,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """Nothing of interest."""

    def attention(self, q: Tensor, kv_cache: Tensor, batch: AttentionBatch, scale: float, softcap: float, out: Tensor) -> None:
        """Attention over the step's tokens."""
        self._hears.work("attention", q.shape[0])

    def penalize(
        self, logits_row: Tensor, prompt_ids: Tensor, output_ids: Tensor, repetition: float, presence: float, frequency: float
    ) -> None:
        """Nothing of interest."""

    def sample(self, logits: Tensor, batch: SamplingBatch, out_ids: Tensor) -> None:
        """Sampling; where rows are not greedy, their logits are sorted."""
        self._hears.work("sample", logits.shape[0])
        if not batch.all_greedy:
            self._hears.work("sort", logits.shape[0])

    def top_logprobs(
        self, logits: Tensor, chosen: Tensor, out_chosen: Tensor, out_rank: Tensor, out_ids: Tensor, out_values: Tensor
    ) -> None:
        """Log-probabilities of rows."""
        self._hears.work("logprobs", logits.shape[0])
