"""The host's side of captured decode steps that fetch their inputs themselves. Owns the page-locked sets and whose turn it is.

Nothing is copied between two graphs; see `HostFeed`. Every replay takes the next set, on the host as on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from brim.kernels.base import FedStep, HostFeed, Kernels
from brim.memory.kv_layout import KVLayout
from brim.platforms.base import Marker
from brim.worker.programs import Replayable
from brim.worker.sampler import Sampler, SampleRows
from brim.worker.step_inputs import StepArrays, StepInputs

_HOST = torch.device("cpu")


class DecodeFeed:
    """Sets for num_sets steps in flight, beside the device's buffers of `inputs` and `sampler`. mark gives a marker after all
    that is queued."""

    def __init__(
        self, kernels: Kernels, layout: KVLayout, inputs: StepInputs, sampler: Sampler, mark: Callable[[], Marker], num_sets: int
    ) -> None:
        self._kernels, self._layout, self._inputs, self._sampler, self._mark = kernels, layout, inputs, sampler, mark
        self._nobody = len(inputs.seq_lens)
        locked = inputs.turn.device != _HOST

        def array(like: torch.Tensor) -> torch.Tensor:
            return torch.zeros((num_sets, *like.shape), dtype=like.dtype, pin_memory=locked)

        params = sampler.params_view(0, self._nobody, False)
        self._feed = HostFeed(
            turn=inputs.turn,
            ids=array(inputs.ids[: self._nobody]),
            rows=array(inputs.rows),
            seeds=array(params.seed),
            seq_lens=array(inputs.seq_lens),
            top_k=array(params.top_k),
            temperature=array(params.temperature),
            top_p=array(params.top_p),
            min_p=array(params.min_p),
            tables=tuple(array(table) for table in inputs.block_tables),
            sampled=array(inputs.ids[: self._nobody]),
        )
        self._host = {
            name: getattr(self._feed, name).numpy()
            for name in ("ids", "rows", "seeds", "seq_lens", "top_k", "temperature", "top_p", "min_p", "sampled")
        }
        self._tables = [table.numpy() for table in self._feed.tables]
        self._set = 0

    def _step(self, num_seqs: int) -> FedStep:
        inputs, sampler = self._inputs, self._sampler
        return FedStep(
            ids=inputs.ids[:num_seqs],
            rows=inputs.rows[:num_seqs],
            positions=inputs.positions[:num_seqs],
            seq_lens=inputs.seq_lens[:num_seqs],
            slots=tuple(slots[:num_seqs] for slots in inputs.slot_mappings),
            tables=tuple(table[:num_seqs] for table in inputs.block_tables),
            sampling=sampler.params_view(0, num_seqs, False),
            last_ids=sampler.last_ids,
            block_size=self._layout.block_size,
        )

    def begin(self, num_seqs: int) -> None:
        """The first calls of a captured step."""
        self._kernels.begin_decodes(self._feed, self._step(num_seqs))

    def end(self, num_seqs: int) -> None:
        """The last call of a captured step."""
        sampler = self._sampler
        self._kernels.end_decodes(self._feed, self._step(num_seqs), sampler.hidden[:num_seqs], sampler.ids[:num_seqs])

    def run(self, step: StepArrays, settings: SampleRows, size: int, program: Replayable) -> Callable[[], NDArray[np.int64]]:
        """Queue the captured step of `size` sequences for this one; the returned call waits for the ids: [S], -1 for rows that
        are not finite."""
        place, count = self._set, step.num_seqs
        self._set = (place + 1) % len(self._tables[0])
        self._fill({name: values[place] for name, values in self._host.items()}, step, settings, size)
        for table, source in zip(self._tables, step.block_tables, strict=True):
            table[place, :count, : source.shape[1]] = source
        program.replay()
        marker = self._mark()
        sampled: NDArray[np.int64] = self._host["sampled"][place]

        def read() -> NDArray[np.int64]:
            marker.wait()
            return np.array(sampled[:count])

        return read

    def _fill(self, host: dict[str, NDArray[Any]], step: StepArrays, settings: SampleRows, size: int) -> None:
        count = step.num_seqs
        host["ids"][:count] = step.token_ids
        host["rows"][:count] = self._nobody if step.rows is None else step.rows
        np.add(step.start_positions, step.query_lens, out=host["seq_lens"][:count])
        host["seeds"][:count] = settings.seed
        for name in ("top_k", "temperature", "top_p", "min_p"):
            host[name][:count] = getattr(settings, name)
        for name, padding in (("ids", 0), ("rows", self._nobody), ("seq_lens", 0), ("temperature", 0)):
            host[name][count:size] = padding
