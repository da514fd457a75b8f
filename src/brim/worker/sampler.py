"""From hidden states to token ids. Owns the static sampling buffers and the order: logits, penalties, biases, sample, logprobs.

Logits exist for at most `logit_rows` rows at a time, in a buffer of the step workspace that the layers no longer need by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brim.engine.sampling_params import SamplingParams
from brim.engine.step import TokenLogprobs
from brim.kernels.base import Kernels, SamplingBatch
from brim.memory.step_memory import StepLimits, arrays_bytes, sampler_arrays
from brim.models.base import Model
from brim.platforms.base import Marker
from brim.worker.logit_edits import LogitEdits
from brim.worker.mirror import Mirror
from brim.worker.step_sizes import Sizes

_DTYPES = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "sums", "chosen", "top_values", "row_copy", "edits"), torch.float32),
    **dict.fromkeys(("seed", "position", "ids", "last_ids", "rank", "top_ids", "targets", "history"), torch.int64),
    "top_k": torch.int32,
}
_PARAMS = ("temperature", "top_k", "top_p", "min_p", "seed", "position")


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


class Sampler:
    """Samples R rows in chunks of `logit_rows`. Buffers are allocated once; `num_bytes` is exact.

    logits [rows, vocab] float32: where logits are made; rows bounds the chunks. row_sizes: to which numbers of rows the logits'
    product is rounded up. mark gives a marker after all that is queued. num_sets: steps that may be in flight.
    """

    def __init__(
        self,
        kernels: Kernels,
        model: Model,
        limits: StepLimits,
        logits: Tensor,
        row_sizes: Sizes,
        mark: Callable[[], Marker],
        num_sets: int = 1,
    ) -> None:
        self._kernels = kernels
        self._model = model
        self._row_sizes = row_sizes
        self._mark = mark
        self.logits = logits
        self.logit_rows, vocab_size = logits.shape
        arrays = sampler_arrays(vocab_size, model.spec.hidden_size, limits, model.dtype.itemsize, self.logit_rows)
        self._mirror = Mirror(arrays, {**_DTYPES, "hidden": model.dtype}, logits.device, num_sets)
        static = self._mirror.device
        self.hidden, self.ids, self._sums = static["hidden"], static["ids"], static["sums"]
        self.last_ids = static["last_ids"]
        self._params = SamplingBatch(
            static["temperature"],
            static["top_k"],
            static["top_p"],
            static["min_p"],
            static["seed"],
            static["position"],
            all_greedy=False,
        )
        self._static = static
        self._edits = LogitEdits(kernels, static["history"], static["edits"])

    @property
    def num_bytes(self) -> int:
        """Bytes of all sampling buffers on the device, without the logits."""
        return self._mirror.num_bytes

    @staticmethod
    def bytes_for(vocab_size: int, hidden_size: int, limits: StepLimits, element_bytes: int, rows: int) -> int:
        """What a Sampler of these limits holds, without building one."""
        return arrays_bytes(sampler_arrays(vocab_size, hidden_size, limits, element_bytes, rows))

    def set_params(self, rows: SampleRows) -> None:
        """Copy the parameter arrays [R] into the static buffers."""
        count = len(rows.temperature)
        host = self._mirror.host
        for name in _PARAMS:
            host[name][:count] = getattr(rows, name)
        self._mirror.upload_span(_PARAMS[0], _PARAMS[-1])

    def params_view(self, start: int, stop: int, all_greedy: bool) -> SamplingBatch:
        """Rows start..stop of the static parameter buffers."""
        p = self._params
        part = slice(start, stop)
        return SamplingBatch(
            p.temperature[part], p.top_k[part], p.top_p[part], p.min_p[part], p.seed[part], p.position[part], all_greedy
        )

    def sample(self, hidden: Tensor, rows: Tensor | None, settings: SampleRows) -> dict[int, TokenLogprobs]:
        """Sample a token for each of hidden[rows[R]], or of hidden[R] where rows is None; ids land in `self.ids[:R]`. Returns
        log-probabilities by row for those who asked (after penalties and biases, before temperature)."""
        count = len(settings.temperature)
        if rows is None:
            self.hidden[:count].copy_(hidden)
        else:
            self._kernels.gather_rows(hidden, rows, self.hidden[:count])
        self.set_params(settings)
        all_greedy = not np.any(settings.temperature)
        logprobs: dict[int, TokenLogprobs] = {}
        for start in range(0, count, self.logit_rows):
            stop = min(count, start + self.logit_rows)
            logits = self._make_logits(start, stop)
            special = [row for row in settings.special if start <= row.index < stop]
            for row in special:
                self._edits.apply(logits[row.index - start], row.params, row.prompt_ids, row.output_ids, row.banned_ids)
            wanted = [row for row in special if row.params.logprobs is not None]
            if wanted:
                logprobs.update(self._sample_and_score(logits, wanted, start))
            self._kernels.sample(logits, self.params_view(start, stop, all_greedy), self.ids[start:stop])
        return logprobs

    def _make_logits(self, start: int, stop: int) -> Tensor:
        """Logits of self.hidden[start:stop]; the product is made for a rounded number of rows."""
        count = stop - start
        padded = min(self._row_sizes.up(count), self.logit_rows, len(self.hidden) - start)
        self._model.logits(self.hidden[start : start + padded], self.logits[:padded])
        return self.logits[:count]

    def _sample_and_score(self, logits: Tensor, wanted: list[SpecialRow], start: int) -> dict[int, TokenLogprobs]:
        """Log-probabilities of the tokens that the rows will get. Sampling may overwrite logits, so each row is drawn from a
        copy; drawn again with all others, it gives the same token."""
        num_best = [0] * len(logits)
        targets = self._static["targets"][: len(logits)]
        targets.zero_()
        row_copy = self._static["row_copy"]
        for row in wanted:
            place = row.index - start
            num_best[place] = row.params.logprobs or 0
            row_copy.copy_(logits[place : place + 1])
            part = self.params_view(row.index, row.index + 1, row.params.is_greedy)
            self._kernels.sample(row_copy, part, self.ids[row.index : row.index + 1])
            targets[place : place + 1].copy_(self.ids[row.index : row.index + 1]).clamp_(min=0)
        scores = list(self._score(logits, targets, num_best))
        return {row.index: scores[row.index - start] for row in wanted}

    def sample_chunk_all(self, hidden: Tensor, rows: Tensor, all_greedy: bool) -> None:
        """The kernel calls of sampling R <= logit_rows plain rows, and nothing else: what a captured decode step holds."""
        count = len(rows)
        self._kernels.gather_rows(hidden, rows, self.hidden[:count])
        self._model.logits(self.hidden[:count], self.logits[:count])
        self._kernels.sample(self.logits[:count], self.params_view(0, count, all_greedy), self.ids[:count])

    def start_read(self, count: int) -> Callable[[], NDArray[np.int64]]:
        """Queue the way back of the sampled ids; the returned call waits for them: [count], -1 for rows that are not finite."""
        if count:
            torch.sum(self.hidden[:count], dim=-1, dtype=torch.float32, out=self._sums[:count])
            self._mirror.download_span("ids", "sums")
        marker, host = self._mark(), self._mirror.host
        self._mirror.turn()

        def read() -> NDArray[np.int64]:
            marker.wait()
            return np.where(np.isfinite(host["sums"][:count]), host["ids"][:count], -1)

        return read

    def prompt_logprobs(self, hidden: Tensor, targets: NDArray[np.int64], num_best: int) -> list[TokenLogprobs]:
        """Score targets[n] (the token after each position) against hidden[n, hidden_size], in chunks of logit_rows."""
        scored: list[TokenLogprobs] = []
        step = min(self.logit_rows, len(self.hidden))
        for start in range(0, len(targets), step):
            stop = min(len(targets), start + step)
            count = stop - start
            self.hidden[:count].copy_(hidden[start:stop])
            logits = self._make_logits(0, count)
            on_device = self._static["targets"][:count]
            on_device.copy_(torch.from_numpy(targets[start:stop]))
            scored.extend(self._score(logits, on_device, [num_best] * count))
        return scored

    def warm_rows(self, count: int) -> None:
        """Run the logits' product for so many rows of whatever the buffers hold."""
        self._model.logits(self.hidden[:count], self.logits[:count])

    def _score(self, logits: Tensor, targets: Tensor, num_best: list[int]) -> Iterator[TokenLogprobs]:
        """Log-softmax statistics of logits[n] for targets[n]; num_best[n] alternatives each."""
        count, width = len(targets), max(1, *num_best)
        chosen, rank = self._static["chosen"][:count], self._static["rank"][:count]
        ids, values = self._static["top_ids"][:count, :width], self._static["top_values"][:count, :width]
        self._kernels.top_logprobs(logits, targets, chosen, rank, ids, values)
        columns = (targets.tolist(), chosen.tolist(), rank.tolist(), ids.tolist(), values.tolist())
        for best, token, logprob, place, top_ids, top_logprobs in zip(num_best, *columns, strict=True):
            yield TokenLogprobs(
                token_id=token,
                logprob=logprob,
                rank=place,
                top_ids=tuple(top_ids[:best]),
                top_logprobs=tuple(top_logprobs[:best]),
            )
