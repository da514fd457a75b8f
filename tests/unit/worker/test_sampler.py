"""The sampler over a model whose hidden states are its logits, against plain numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from brim.config.schema import MAX_LOGPROBS
from brim.engine.sampling_params import SamplingParams
from brim.kernels.base import Kernels
from brim.memory.step_memory import StepLimits
from brim.platforms.fake import FakeDevice, FakePlatform
from brim.worker.sampler import Sampler, SampleRows, SpecialRow
from brim.worker.step_sizes import Sizes

VOCAB = 96


class Identity:
    """Hidden states are logits."""

    spec = SimpleNamespace(vocab_size=VOCAB, hidden_size=VOCAB)
    dtype = torch.float32

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        out.copy_(hidden)


def new_sampler(kernels: Kernels, num_seqs: int, rows: int | None = None) -> Sampler:
    """For num_seqs sequences of up to 64 tokens, with logits for `rows` of them at once."""
    logits = torch.zeros(min(rows or num_seqs, num_seqs), VOCAB)
    limits = StepLimits(num_seqs, max(64, num_seqs), 64)
    return Sampler(kernels, Identity(), limits, logits, Sizes(()), FakePlatform(FakeDevice()).mark)  # type: ignore[arg-type]


@dataclass
class Row:
    """One row to sample and its history."""

    params: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0))
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    banned: tuple[int, ...] = ()
    seed: int = 0

    def special(self, index: int) -> SpecialRow:
        ids = (np.array(self.prompt, dtype=np.int64), np.array(self.output, dtype=np.int64))
        return SpecialRow(index, self.params, *ids, self.banned)


def settings(rows: list[Row]) -> SampleRows:
    def column(values: list[Any], dtype: Any) -> np.ndarray:
        return np.array(values, dtype=dtype)

    params = [row.params for row in rows]
    return SampleRows(
        temperature=column([p.temperature for p in params], np.float32),
        top_k=column([max(p.top_k, 0) for p in params], np.int32),
        top_p=column([p.top_p for p in params], np.float32),
        min_p=column([p.min_p for p in params], np.float32),
        seed=column([row.seed for row in rows], np.int64),
        position=column([len(row.prompt) + len(row.output) for row in rows], np.int64),
        special=tuple(
            row.special(i)
            for i, row in enumerate(rows)
            if row.params.needs_history or row.params.logit_bias or row.params.logprobs is not None or row.banned
        ),
    )


def edited(logits: np.ndarray, row: Row) -> np.ndarray:
    """Penalties, then biases, then bans, one id at a time."""
    values, params = logits.astype(np.float64), row.params
    for token in set(row.prompt) | set(row.output):
        values[token] *= 1 / params.repetition_penalty if values[token] > 0 else params.repetition_penalty
    for token in set(row.output):
        values[token] -= params.presence_penalty + params.frequency_penalty * row.output.count(token)
    for token, bias in params.logit_bias.items():
        values[token] += bias
    values[list(row.banned)] = -np.inf
    return values


def log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max()
    return shifted - np.log(np.exp(shifted).sum())


def random_rows(count: int) -> list[Row]:
    """Rows of every kind, some plain."""
    rng = np.random.default_rng(3)

    def ids(most: int) -> list[int]:
        return rng.integers(0, VOCAB, rng.integers(0, most)).tolist()

    rows = []
    for index in range(count):
        changes: dict[str, Any] = {}
        if index % 2:
            changes |= {"repetition_penalty": float(rng.uniform(0.5, 2)), "presence_penalty": float(rng.uniform(-2, 2))}
        if index % 3 == 0:
            changes |= {"frequency_penalty": float(rng.uniform(-2, 2)), "logprobs": int(rng.integers(0, MAX_LOGPROBS + 1))}
        if index % 4 == 1:
            changes |= {"logit_bias": {int(t): float(rng.uniform(-9, 9)) for t in rng.integers(0, VOCAB, 5)}}
        banned = tuple(rng.choice(VOCAB, 3, replace=False).tolist()) if index % 5 == 2 else ()
        rows.append(Row(SamplingParams(temperature=0, **changes), ids(20), ids(30), banned))
    return rows


@pytest.mark.parametrize("logit_rows", [1, 3, 64])
def test_greedy_with_everything_at_once(kernels: Kernels, logit_rows: int) -> None:
    """Whatever number of logits rows is held at a time."""
    rows = random_rows(40)
    sampler = new_sampler(kernels, 64, logit_rows)
    assert sampler.logit_rows == min(logit_rows, 64)
    hidden = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    where = torch.randperm(50, generator=torch.Generator().manual_seed(2))[:40]
    logprobs = sampler.sample(hidden, where, settings(rows))
    assert set(logprobs) == {i for i, row in enumerate(rows) if row.params.logprobs is not None}
    for i, row in enumerate(rows):
        values = edited(hidden[where[i]].numpy(), row)
        token = int(values.argmax())
        assert sampler.ids[i] == token, f"row {i}"
        if row.params.logprobs is None:
            continue
        scores, exact = logprobs[i], log_softmax(values)
        best = np.argsort(-values, kind="stable")[: row.params.logprobs]
        assert (scores.token_id, scores.rank, list(scores.top_ids)) == (token, 1, best.tolist())
        assert scores.logprob == pytest.approx(exact[token], abs=1e-4)
        assert scores.top_logprobs == pytest.approx(exact[best], abs=1e-4)


def test_a_banned_or_sampled_token_has_its_own_rank(kernels: Kernels) -> None:
    hidden = torch.linspace(4, 0, VOCAB)[None]
    rows = [Row(SamplingParams(temperature=5.0, logprobs=2), seed=11)]
    sampler = new_sampler(kernels, 1)
    scores = sampler.sample(hidden, torch.tensor([0]), settings(rows))[0]
    exact = log_softmax(hidden[0].numpy().astype(np.float64))
    assert scores.token_id == int(sampler.ids[0]) and scores.rank == scores.token_id + 1 > 2
    assert scores.logprob == pytest.approx(exact[scores.token_id], abs=1e-4), "log-probabilities are before temperature"
    banned = [Row(banned=(0, 1))]
    sampler.sample(hidden, torch.tensor([0]), settings(banned))
    assert sampler.ids[0] == 2


@pytest.mark.parametrize("logit_rows", [2, 64])
def test_prompt_logprobs(kernels: Kernels, logit_rows: int) -> None:
    hidden = torch.randn(7, VOCAB) * 3
    targets = np.arange(7, dtype=np.int64) * 13
    sampler = new_sampler(kernels, 64, logit_rows)
    for position, scores in enumerate(sampler.prompt_logprobs(hidden, targets, 4)):
        exact = log_softmax(hidden[position].numpy().astype(np.float64))
        token = int(targets[position])
        assert scores.token_id == token and scores.rank == 1 + int((exact > exact[token]).sum())
        assert scores.logprob == pytest.approx(exact[token], abs=1e-4)
        assert list(scores.top_ids) == np.argsort(-exact, kind="stable")[:4].tolist()
    assert sampler.prompt_logprobs(hidden[:0], targets[:0], 4) == []


def expected_distribution(values: np.ndarray, params: SamplingParams) -> np.ndarray:
    """softmax(logits / temperature), then top_k, of those top_p, of those min_p, as the kernel contract says."""
    probs = np.exp(log_softmax(values.astype(np.float64) / params.temperature))
    order = np.argsort(-probs, kind="stable")
    keep = order[: params.top_k] if params.top_k > 0 else order
    mass = probs[keep].cumsum() / probs[keep].sum()
    keep = keep[: int(np.searchsorted(mass, params.top_p - 1e-9)) + 1]
    keep = keep[probs[keep] >= params.min_p * probs.max()]
    kept = np.zeros_like(probs)
    kept[keep] = probs[keep]
    return kept / kept.sum()


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.4}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"temperature": 1.7, "top_k": 30, "top_p": 0.8}],
    ids=str,
)
def test_sampled_tokens_follow_the_distribution(kernels: Kernels, changes: dict[str, float]) -> None:
    """Pearson's chi-square over 6,000 draws with seeds 0, 1, 2, ...; the limit is passed once in ten thousand."""
    draws = 6000
    params = SamplingParams(**{"temperature": 1.0, **changes})
    hidden = (torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(4)) * 2).expand(draws, VOCAB).contiguous()
    sampler = new_sampler(kernels, draws)
    sampler.sample(hidden, torch.arange(draws), settings([Row(params, seed=seed) for seed in range(draws)]))
    counts = np.bincount(sampler.ids.numpy(), minlength=VOCAB)
    expected = expected_distribution(hidden[0].numpy(), params) * draws
    assert not counts[expected == 0].any(), "a token was sampled that had been cut off"
    big = expected >= 5
    observed = np.append(counts[big], counts[~big].sum())
    wanted = np.append(expected[big], expected[~big].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = len(wanted) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * np.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty 1931
    assert statistic < limit


def test_a_token_depends_on_its_own_row_only(kernels: Kernels) -> None:
    """The same seed and position give the same token alone, in a batch, and between greedy rows."""
    hidden = torch.randn(9, VOCAB)
    rows = [Row(SamplingParams(temperature=0.9 if i % 3 else 0.0), prompt=[1] * i, seed=100 + i) for i in range(9)]
    sampler = new_sampler(kernels, 9)
    sampler.sample(hidden, torch.arange(9), settings(rows))
    together = sampler.ids.tolist()
    for i, row in enumerate(rows):
        sampler.sample(hidden, torch.tensor([i]), settings([row]))
        assert sampler.ids[0] == together[i]
    sampler.sample(hidden, torch.arange(9).flip(0), settings(rows[::-1]))
    assert sampler.ids.tolist() == together[::-1]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_only_the_row_that_is_not_finite_fails(kernels: Kernels, poison: float) -> None:
    hidden = torch.randn(4, VOCAB)
    clean = hidden.clone()
    hidden[2, 5] = poison
    rows = [Row(SamplingParams(temperature=t, logprobs=3), seed=i) for i, t in enumerate((0.0, 0.8, 0.8, 0.0))]
    sampler = new_sampler(kernels, 4)
    sampler.sample(clean, torch.arange(4), settings(rows))
    expected = sampler.start_read(4)().tolist()
    assert min(expected) >= 0
    sampler.sample(hidden, torch.arange(4), settings(rows))
    assert sampler.start_read(4)().tolist() == [expected[0], expected[1], -1, expected[3]]


def test_bytes_are_known_before_building(kernels: Kernels) -> None:
    sampler = new_sampler(kernels, 7)
    assert Sampler.bytes_for(VOCAB, VOCAB, StepLimits(7, 64, 64), 4, 7) == sampler.num_bytes
