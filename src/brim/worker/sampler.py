"""From hidden states to token ids. Owns the static sampling buffers and the order: logits, biases, penalties, sample, logprobs.

Logits exist for at most `logit_rows` rows at a time, so the buffer is small and its size does not depend on the request.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brim.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from brim.engine.step import TokenLogprobs
from brim.kernels.base import Kernels, SamplingBatch
from brim.models.base import Model

LOGITS_BUFFER_BYTES = 32 << 20
_NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True, slots=True)
class SpecialRow:
    """A sampled row that needs more than the parameter arrays: history, biases, banned ids or log-probabilities."""

    index: int
    params: SamplingParams
    prompt_ids: NDArray[np.int64]
    output_ids: NDArray[np.int64]
    banned_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SampleRows:
    """R rows to sample: parameter arrays [R] (see SamplingBatch), and the rows that are special."""

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int32]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    seed: NDArray[np.int64]
    position: NDArray[np.int64]
    special: tuple[SpecialRow, ...] = ()


def logit_rows_for(max_num_seqs: int, vocab_size: int) -> int:
    """Rows of float32 logits held at once: all sequences where they fit in 32 MiB, else as many as do, at least one."""
    return max(1, min(max_num_seqs, LOGITS_BUFFER_BYTES // (4 * vocab_size)))


class Sampler:
    """Samples R rows in chunks of `logit_rows`. Buffers are allocated once; `num_bytes` is exact."""

    def __init__(self, kernels: Kernels, model: Model, max_num_seqs: int) -> None:
        self._kernels = kernels
        self._model = model
        vocab_size, device = model.spec.vocab_size, "cpu"
        self.logit_rows = logit_rows_for(max_num_seqs, vocab_size)
        self.hidden = torch.zeros(max_num_seqs, model.spec.hidden_size, dtype=model.dtype, device=device)
        self.logits = torch.zeros(self.logit_rows, vocab_size, dtype=torch.float32, device=device)
        self.ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._params = SamplingBatch(
            temperature=torch.zeros(max_num_seqs, dtype=torch.float32),
            top_k=torch.zeros(max_num_seqs, dtype=torch.int32),
            top_p=torch.ones(max_num_seqs, dtype=torch.float32),
            min_p=torch.zeros(max_num_seqs, dtype=torch.float32),
            seed=torch.zeros(max_num_seqs, dtype=torch.int64),
            position=torch.zeros(max_num_seqs, dtype=torch.int64),
            all_greedy=False,
        )
        rows = self.logit_rows
        self._chosen = torch.zeros(rows, dtype=torch.float32)
        self._rank = torch.zeros(rows, dtype=torch.int64)
        self._top_ids = torch.zeros(rows, MAX_LOGPROBS, dtype=torch.int64)
        self._top_values = torch.zeros(rows, MAX_LOGPROBS, dtype=torch.float32)
        self._targets = torch.zeros(rows, dtype=torch.int64)
        self._row_copy = torch.zeros(1, vocab_size, dtype=torch.float32)

    @property
    def num_bytes(self) -> int:
        """Bytes of all sampling buffers."""
        p = self._params
        params = (p.temperature, p.top_k, p.top_p, p.min_p, p.seed, p.position)
        logprobs = (self._chosen, self._rank, self._top_ids, self._top_values, self._targets, self._row_copy)
        return sum(t.nbytes for t in (self.hidden, self.logits, self.ids, *params, *logprobs))

    @staticmethod
    def bytes_for(max_num_seqs: int, vocab_size: int, hidden_size: int, element_bytes: int) -> int:
        """What a Sampler of these limits holds, without building one."""
        rows = logit_rows_for(max_num_seqs, vocab_size)
        per_seq = hidden_size * element_bytes + 8 + 4 * 4 + 8 * 2
        return max_num_seqs * per_seq + rows * (4 * vocab_size + 4 + 8 + 12 * MAX_LOGPROBS + 8) + 4 * vocab_size

    def set_params(self, rows: SampleRows) -> None:
        """Copy the parameter arrays [R] into the static buffers."""
        count = len(rows.temperature)
        target = self._params
        for buffer, values in (
            (target.temperature, rows.temperature),
            (target.top_k, rows.top_k),
            (target.top_p, rows.top_p),
            (target.min_p, rows.min_p),
            (target.seed, rows.seed),
            (target.position, rows.position),
        ):
            buffer.numpy()[:count] = values

    def params_view(self, start: int, stop: int, all_greedy: bool) -> SamplingBatch:
        """Rows start..stop of the static parameter buffers."""
        p = self._params
        part = slice(start, stop)
        return SamplingBatch(
            p.temperature[part], p.top_k[part], p.top_p[part], p.min_p[part], p.seed[part], p.position[part], all_greedy
        )

    def sample(self, hidden: Tensor, rows: Tensor, settings: SampleRows) -> dict[int, TokenLogprobs]:
        """Sample a token for each of hidden[rows[R]]; ids land in `self.ids[:R]`. Returns log-probabilities by row for those who
        asked (after penalties and biases, before temperature)."""
        count = len(rows)
        self._kernels.gather_rows(hidden, rows, self.hidden[:count])
        self.set_params(settings)
        all_greedy = not np.any(settings.temperature)
        logprobs: dict[int, TokenLogprobs] = {}
        for start in range(0, count, self.logit_rows):
            stop = min(count, start + self.logit_rows)
            logits = self.logits[: stop - start]
            self._model.logits(self.hidden[start:stop], logits)
            special = [row for row in settings.special if start <= row.index < stop]
            self._edit_logits(logits, special, start)
            wanted = [row for row in special if row.params.logprobs is not None]
            if wanted:
                logprobs.update(self._sample_and_score(logits, wanted, start))
            self._kernels.sample(logits, self.params_view(start, stop, all_greedy), self.ids[start:stop])
        return logprobs

    def _sample_and_score(self, logits: Tensor, wanted: list[SpecialRow], start: int) -> dict[int, TokenLogprobs]:
        """Log-probabilities of the tokens that the rows will get. Sampling may overwrite logits, so each row is drawn from a
        copy; drawn again with all others, it gives the same token."""
        num_best = [0] * len(logits)
        for row in wanted:
            num_best[row.index - start] = row.params.logprobs or 0
            self._row_copy.copy_(logits[row.index - start : row.index - start + 1])
            part = self.params_view(row.index, row.index + 1, row.params.is_greedy)
            self._kernels.sample(self._row_copy, part, self.ids[row.index : row.index + 1])
        targets = self._targets[: len(logits)]
        targets.zero_()
        for row in wanted:
            targets[row.index - start] = self.ids[row.index].clamp(min=0)
        scores = list(self._score(logits, targets, num_best))
        return {row.index: scores[row.index - start] for row in wanted}

    def sample_chunk_all(self, hidden: Tensor, rows: Tensor, all_greedy: bool) -> None:
        """The kernel calls of sampling R <= logit_rows plain rows, and nothing else: what a recorded decode step holds."""
        count = len(rows)
        self._kernels.gather_rows(hidden, rows, self.hidden[:count])
        self._model.logits(self.hidden[:count], self.logits[:count])
        self._kernels.sample(self.logits[:count], self.params_view(0, count, all_greedy), self.ids[:count])

    def mark_failed(self, count: int) -> None:
        """Set the ids of rows whose hidden state is not finite to -1."""
        hidden = self.hidden[:count]
        if math.isfinite(hidden.sum(dtype=torch.float32).item()):
            return
        finite = torch.isfinite(hidden.sum(dim=-1, dtype=torch.float32))
        self.ids[:count][~finite] = -1

    def prompt_logprobs(self, hidden: Tensor, targets: NDArray[np.int64], num_best: int) -> list[TokenLogprobs]:
        """Score targets[n] (the token after each position) against hidden[n, hidden_size], in chunks of logit_rows."""
        scored: list[TokenLogprobs] = []
        for start in range(0, len(targets), self.logit_rows):
            stop = min(len(targets), start + self.logit_rows)
            logits = self.logits[: stop - start]
            self._model.logits(hidden[start:stop], logits)
            self._targets.numpy()[: stop - start] = targets[start:stop]
            scored.extend(self._score(logits, self._targets[: stop - start], [num_best] * (stop - start)))
        return scored

    def _edit_logits(self, logits: Tensor, special: list[SpecialRow], start: int) -> None:
        """Penalties, then biases, then bans, in place on the chunk's logits."""
        for row in special:
            values = logits[row.index - start]
            params = row.params
            if params.needs_history:
                self._kernels.penalize(
                    values,
                    torch.from_numpy(row.prompt_ids),
                    torch.from_numpy(row.output_ids),
                    params.repetition_penalty,
                    params.presence_penalty,
                    params.frequency_penalty,
                )
            view = values.numpy()
            if params.logit_bias:
                ids = np.fromiter(params.logit_bias, dtype=np.int64)
                view[ids] += np.fromiter(params.logit_bias.values(), dtype=np.float32)
            if row.banned_ids:
                view[list(row.banned_ids)] = _NEGATIVE_INFINITY

    def _score(self, logits: Tensor, targets: Tensor, num_best: list[int]) -> Iterator[TokenLogprobs]:
        """Log-softmax statistics of logits[n] for targets[n]; num_best[n] alternatives each."""
        count, width = len(targets), max(1, *num_best)
        ids, values = self._top_ids[:count, :width], self._top_values[:count, :width]
        self._kernels.top_logprobs(logits, targets, self._chosen[:count], self._rank[:count], ids, values)
        for i in range(count):
            best = num_best[i]
            yield TokenLogprobs(
                token_id=int(targets[i]),
                logprob=float(self._chosen[i]),
                rank=int(self._rank[i]),
                top_ids=tuple(ids[i, :best].tolist()),
                top_logprobs=tuple(values[i, :best].tolist()),
            )
