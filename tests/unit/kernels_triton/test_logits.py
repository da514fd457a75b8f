"""Sampling, log-probabilities and penalties against the reference, on small vocabularies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from brim.kernels.base import SamplingBatch
from brim.kernels.torch_ref import TorchKernels
from brim.kernels.triton.kernels import TritonKernels
from brim.kernels.triton.scratch import KernelLimits

from .helpers import assert_same_samples, sampling_batch


def _kernels(device: str, rows: int, vocab: int) -> TritonKernels:
    return TritonKernels(device, KernelLimits(rows, 1, 1, 16, vocab))


@pytest.mark.parametrize(("rows", "vocab", "spread"), [(20, 1003, 3.0), (12, 17, 1.0), (6, 9001, 0.01)])
def test_sample(device: str, rows: int, vocab: int, spread: float) -> None:
    logits = (torch.randn(rows, vocab + 5) * spread).to(device)[:, :vocab]
    assert_same_samples(_kernels(device, rows, vocab), logits, sampling_batch(rows, device))


def test_greedy_takes_the_lowest_id_of_the_best(device: str) -> None:
    logits = torch.randint(0, 50, (3, 9000)).float()
    for row in range(3):
        logits[row, torch.randint(0, 9000, (3,))] = 77.0
    out = torch.full((3,), -1, device=device)
    _kernels(device, 3, 9000).sample(logits.to(device), sampling_batch(3, device, greedy=True), out)
    assert out.tolist() == [int((row == row.max()).nonzero()[0]) for row in logits]


TRUNCATIONS = [
    ((2, 1.0, 0.0), {0, 2}),
    ((0, 0.54, 0.0), {0, 2}),
    ((0, 0.56, 0.0), {0, 2, 3}),
    ((0, 1.0, 0.8), {0, 2}),
    ((3, 0.7, 0.0), {0, 2}),
    ((1, 1.0, 0.0), {0}),
    ((0, 0.0, 0.0), {0}),
    ((5, 1.0, 0.0), {0, 1, 2, 3, 4}),
]


def test_truncation_keeps_exactly_the_right_ids(device: str) -> None:
    each = 10
    rows = each * len(TRUNCATIONS)
    settings = [setting for setting, _ in TRUNCATIONS for _ in range(each)]
    batch = SamplingBatch(
        torch.ones(rows, device=device),
        torch.tensor([s[0] for s in settings], dtype=torch.int32, device=device),
        torch.tensor([s[1] for s in settings], device=device),
        torch.tensor([s[2] for s in settings], device=device),
        torch.arange(rows, device=device),
        torch.arange(rows, device=device),
        False,
    )
    logits = torch.tensor([0.3, 0.1, 0.25, 0.2, 0.15], device=device).log().expand(rows, 5).contiguous()
    out = torch.empty(rows, dtype=torch.int64, device=device)
    _kernels(device, rows, 5).sample(logits, batch, out)
    for index, (setting, kept) in enumerate(TRUNCATIONS):
        drawn = set(out[index * each : (index + 1) * each].tolist())
        assert drawn == kept if len(kept) <= 2 else drawn <= kept, setting


@pytest.mark.parametrize(("vocab", "width"), [(5003, 3), (16, 16), (33, 0)])
def test_top_logprobs(device: str, vocab: int, width: int) -> None:
    rows = 3
    logits = (torch.randn(rows, vocab) * 4).round(decimals=1).to(device)  # with ties
    chosen = torch.randint(0, vocab, (rows,), device=device)

    def outputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        floats = torch.full((rows, width + 1), float("nan"), device=device)
        ids = torch.full((rows, width + 1), -1, device=device)
        return floats[:, 0], ids[:, 0].clone(), ids[:, 1:], floats[:, 1:]

    out, expected = [t.clone() for t in outputs()], [t.clone() for t in outputs()]
    _kernels(device, rows, vocab).top_logprobs(logits, chosen, *out)
    TorchKernels(device).top_logprobs(logits, chosen, *expected)
    for mine, theirs in zip(out, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [(1.0, 0.0, 0.0), (1.3, 0.0, 0.0), (1.0, 0.5, 0.25), (0.7, -0.5, 1.5)])
def test_penalize(device: str, settings: tuple[float, float, float]) -> None:
    vocab = 3003
    kernels = _kernels(device, 1, vocab)
    row = torch.randn(vocab, device=device) * 4
    expected = row.clone()
    prompt = torch.cat([torch.randint(0, vocab, (50,)), torch.tensor([vocab - 1, 3])]).to(device)
    output = torch.cat([prompt[:10], torch.tensor([5, 5, 5, vocab - 1], device=device)])
    for outputs in (output, output[:0]):
        kernels.penalize(row, prompt, outputs, *settings)
        TorchKernels(device).penalize(expected, prompt, outputs, *settings)
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)
