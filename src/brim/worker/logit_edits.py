"""Changes to single rows of logits before sampling. Owns the order: penalties, then biases, then bans."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brim.engine.sampling_params import SamplingParams
from brim.kernels.base import Kernels

_NEGATIVE_INFINITY = float("-inf")


class LogitEdits:
    """Works through two static device buffers: ids [N] int64 and values [N] float32; N is at least the longest context."""

    def __init__(self, kernels: Kernels, ids: Tensor, values: Tensor) -> None:
        self._kernels = kernels
        self._ids = ids
        self._values = values

    def apply(
        self,
        row: Tensor,
        params: SamplingParams,
        prompt_ids: NDArray[np.int64],
        output_ids: NDArray[np.int64],
        banned_ids: tuple[int, ...],
    ) -> None:
        """Edit row [V] float32 in place. Copies from pageable memory wait for the device, so the buffers are free again."""
        if params.needs_history:
            self._penalize(row, params, prompt_ids, output_ids)
        if params.logit_bias:
            ids = np.fromiter(params.logit_bias, dtype=np.int64)
            biases = np.fromiter(params.logit_bias.values(), dtype=np.float32)
            for part in self._parts(len(ids)):
                on_device, values = self._ids[: part.stop - part.start], self._values[: part.stop - part.start]
                on_device.copy_(torch.from_numpy(ids[part]))
                values.copy_(torch.from_numpy(biases[part]))
                row.index_add_(0, on_device, values)
        if banned_ids:
            ids = np.array(banned_ids, dtype=np.int64)
            for part in self._parts(len(ids)):
                on_device = self._ids[: part.stop - part.start]
                on_device.copy_(torch.from_numpy(ids[part]))
                row.index_fill_(0, on_device, _NEGATIVE_INFINITY)

    def _penalize(
        self, row: Tensor, params: SamplingParams, prompt_ids: NDArray[np.int64], output_ids: NDArray[np.int64]
    ) -> None:
        prompt, output = len(prompt_ids), len(output_ids)
        prompt_on_device, output_on_device = self._ids[:prompt], self._ids[prompt : prompt + output]
        if prompt:
            prompt_on_device.copy_(torch.from_numpy(prompt_ids))
        if output:
            output_on_device.copy_(torch.from_numpy(output_ids))
        self._kernels.penalize(
            row,
            prompt_on_device,
            output_on_device,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )

    def _parts(self, count: int) -> Iterator[slice]:
        size = len(self._ids)
        for start in range(0, count, size):
            yield slice(start, min(count, start + size))
