"""A backend's kernels over plain weights. Owns `PlainWeightKernels`: what a compiler needs where a backend packs its weights."""

from __future__ import annotations

import torch
from torch import Tensor

from brim.kernels.base import Activation, AttentionBatch, Kernels, LinearWeight, SamplingBatch
from brim.kernels.torch_ref import TorchKernels


class PlainWeightKernels(Kernels):
    """Matrices are plain tensors, one copy each, and the products and look-ups over them torch's; all else is `base`'s.

    Programs recorded by base cannot hold torch's products, so these kernels record none.
    """

    plain_weights = True

    def __init__(self, base: Kernels, device: torch.device) -> None:
        self.base = base
        self.name = f"{base.name}, plain weights"
        self.num_threads = getattr(base, "num_threads", None)
        self._dense = TorchKernels(device)

    @property
    def scratch_bytes(self) -> int:
        return self.base.scratch_bytes

    def close(self) -> None:
        self.base.close()

    # weights
    def new_linear(self, out_features: int, in_features: int, dtype: torch.dtype) -> LinearWeight:
        return self._dense.new_linear(out_features, in_features, dtype)

    def linear_num_bytes(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        return self._dense.linear_num_bytes(out_features, in_features, dtype)

    # dense
    def linear(self, x: Tensor, weight: LinearWeight, out: Tensor, bias: Tensor | None = None) -> None:
        self._dense.linear(x, weight, out, bias)

    def embed(self, ids: Tensor, weight: LinearWeight, scale: float, out: Tensor) -> None:
        self._dense.embed(ids, weight, scale, out)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        self.base.rms_norm(x, weight, eps, out)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, post_weight: Tensor | None = None
    ) -> None:
        self.base.add_rms_norm(x, residual, weight, eps, out, post_weight)

    def gated_activation(self, gate_up: Tensor, out: Tensor, activation: Activation) -> None:
        self.base.gated_activation(gate_up, out, activation)

    def gather_rows(self, x: Tensor, rows: Tensor, out: Tensor) -> None:
        self.base.gather_rows(x, rows, out)

    # attention
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
        self.base.rope_and_cache(qkv, positions, cos_sin, kv_cache, slot_mapping, num_heads, q_norm, k_norm, eps)

    def attention(self, q: Tensor, kv_cache: Tensor, batch: AttentionBatch, scale: float, softcap: float, out: Tensor) -> None:
        self.base.attention(q, kv_cache, batch, scale, softcap, out)

    # logits
    def penalize(
        self, logits_row: Tensor, prompt_ids: Tensor, output_ids: Tensor, repetition: float, presence: float, frequency: float
    ) -> None:
        self.base.penalize(logits_row, prompt_ids, output_ids, repetition, presence, frequency)

    def sample(self, logits: Tensor, batch: SamplingBatch, out_ids: Tensor) -> None:
        self.base.sample(logits, batch, out_ids)

    def top_logprobs(
        self, logits: Tensor, chosen: Tensor, out_chosen: Tensor, out_rank: Tensor, out_ids: Tensor, out_values: Tensor
    ) -> None:
        self.base.top_logprobs(logits, chosen, out_chosen, out_rank, out_ids, out_values)
