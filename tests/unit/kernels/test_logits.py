"""Sampling, log-probabilities and penalties against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from brim.kernels.base import SamplingBatch
from brim.kernels.cpu.kernels import CpuKernels
from brim.kernels.torch_ref import TorchKernels, uniform_tensor
from brim.kernels.uniform import uniform_from_seed


def _batch(rows: int, *, greedy: bool = False) -> SamplingBatch:
    kinds = torch.arange(rows)
    return SamplingBatch(
        temperature=torch.where(kinds % 5 == 0, 0.0, 0.2 + torch.rand(rows)),
        top_k=torch.where(kinds % 3 == 0, 0, torch.randint(1, 50, (rows,))).int(),
        top_p=torch.where(kinds % 2 == 0, 1.0, 0.3 + 0.69 * torch.rand(rows)),
        min_p=torch.where(kinds % 4 == 0, 0.1 * torch.rand(rows), 0.0),
        seed=torch.randint(-(2**62), 2**62, (rows,)),
        position=torch.randint(0, 10000, (rows,)),
        all_greedy=greedy,
    )


def test_uniform_number_is_the_same_everywhere() -> None:
    seed, position = torch.randint(-(2**63), 2**63 - 1, (500,)), torch.randint(0, 2**40, (500,))
    assert (uniform_tensor(seed, position).numpy() == uniform_from_seed(seed.numpy(), position.numpy())).all()


@pytest.mark.parametrize(("rows", "vocab", "spread"), [(40, 1003, 3.0), (40, 17, 1.0), (40, 20000, 0.01), (3, 70000, 8.0)])
def test_sample(kernels: CpuKernels, reference: TorchKernels, rows: int, vocab: int, spread: float) -> None:
    logits, batch = torch.randn(rows, vocab + 5)[:, :vocab] * spread, _batch(rows)
    expected, out = torch.full((rows,), -1), torch.full((rows,), -1)
    reference.sample(logits.clone(), batch, expected)
    kernels.sample(logits.clone(), batch, out)
    differing = (expected != out).nonzero().flatten().tolist()
    for row in differing:  # allowed only where the uniform number falls on the border of two ids, within rounding
        _assert_border(logits[row], batch, row, int(out[row]), int(expected[row]))
    assert len(differing) <= max(1, rows // 20)


def _assert_border(logits: Tensor, batch: SamplingBatch, row: int, first: int, second: int) -> None:
    low, high = sorted((first, second))
    between = logits[low + 1 : high].double() / batch.temperature[row].double()
    top = logits.double().max() / batch.temperature[row].double()
    assert (between - top).exp().sum() < 1e-3, "not a matter of rounding"


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_distribution_is_the_one_asked_for(kernels: CpuKernels, spread: float) -> None:
    rows, vocab = 20000, 8
    logits = (torch.randn(vocab) * spread).expand(rows, vocab).contiguous()
    batch = SamplingBatch(
        temperature=torch.full((rows,), 0.8),
        top_k=torch.zeros(rows, dtype=torch.int32),
        top_p=torch.ones(rows),
        min_p=torch.zeros(rows),
        seed=torch.arange(rows),
        position=torch.zeros(rows, dtype=torch.int64),
        all_greedy=False,
    )
    expected = (logits[0] / 0.8).softmax(0)
    out = torch.empty(rows, dtype=torch.int64)
    kernels.sample(logits, batch, out)
    assert (torch.bincount(out, minlength=vocab) / rows - expected).abs().max() < 0.015


def test_truncation_keeps_exactly_the_right_ids(kernels: CpuKernels) -> None:
    probs = torch.tensor([0.4, 0.05, 0.3, 0.2, 0.05])
    cases = [((2, 1.0, 0.0), {0, 2}), ((0, 0.69, 0.0), {0, 2}), ((0, 0.71, 0.0), {0, 2, 3}), ((0, 1.0, 0.6), {0, 2})]
    cases += [((3, 0.7, 0.0), {0, 2}), ((1, 1.0, 0.0), {0}), ((0, 0.0, 0.0), {0}), ((5, 1.0, 0.0), {0, 1, 2, 3, 4})]
    rows = 3000
    for (top_k, top_p, min_p), kept in cases:
        out = torch.empty(rows, dtype=torch.int64)
        batch = SamplingBatch(
            torch.ones(rows),
            torch.full((rows,), top_k, dtype=torch.int32),
            torch.full((rows,), top_p),
            torch.full((rows,), min_p),
            torch.arange(rows),
            torch.arange(rows),
            False,
        )
        kernels.sample(probs.log().expand(rows, 5).contiguous(), batch, out)
        assert set(out.tolist()) == kept, (top_k, top_p, min_p)


@pytest.mark.parametrize("vocab", [1, 3, 64, 1003, 70000])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_greedy_takes_the_lowest_id_of_the_best(threaded: CpuKernels, rows: int, vocab: int) -> None:
    logits = torch.randint(0, 50, (rows, vocab)).float()
    for row in range(rows):
        logits[row, torch.randint(0, vocab, (3,))] = 77.0
    batch, out = _batch(rows, greedy=True), torch.full((rows,), -1)
    threaded.sample(logits, batch, out)
    assert out.tolist() == [int((row == row.max()).nonzero()[0]) for row in logits]


@pytest.mark.parametrize(("vocab", "width"), [(1003, 5), (16, 16), (5000, 0), (33, 1)])
def test_top_logprobs(kernels: CpuKernels, reference: TorchKernels, vocab: int, width: int) -> None:
    rows = 7
    logits = (torch.randn(rows, vocab) * 4).round(decimals=1)  # with ties
    chosen = torch.randint(0, vocab, (rows,))

    def outputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        floats = torch.full((rows,), float("nan")), torch.full((rows, width), float("nan"))
        return floats[0], torch.full((rows,), -1), torch.full((rows, width), -1), floats[1]

    out, expected = outputs(), outputs()
    kernels.top_logprobs(logits, chosen, *out)
    reference.top_logprobs(logits, chosen, *expected)
    torch.testing.assert_close(out[0], expected[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(out[1], expected[1])
    assert torch.equal(out[2], expected[2])
    torch.testing.assert_close(out[3], expected[3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vocab", [1003, (1 << 20) + 77])
@pytest.mark.parametrize("settings", [(1.0, 0.0, 0.0), (1.3, 0.0, 0.0), (1.0, 0.5, 0.25), (0.7, -0.5, 1.5)])
def test_penalize(kernels: CpuKernels, reference: TorchKernels, vocab: int, settings: tuple[float, float, float]) -> None:
    row, expected = (lambda t: (t, t.clone()))(torch.randn(vocab) * 4)
    prompt = torch.cat([torch.randint(0, vocab, (50,)), torch.tensor([vocab - 1, 3])])
    output = torch.cat([prompt[:10], torch.randint(0, vocab, (30,)), torch.tensor([5, 5, 5, vocab - 1])])
    for outputs in (output, output[:0]):
        kernels.penalize(row, prompt, outputs, *settings)
        reference.penalize(expected, prompt, outputs, *settings)
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)
