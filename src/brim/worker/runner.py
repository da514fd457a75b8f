"""Runs one step on the device. Owns the order inside a step: copies, inputs, forward, logits, sampling.

Everything a step needs lives in buffers allocated before; a step allocates nothing on the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from brim.engine.sequence import Sequence
from brim.engine.step import StepPlan, StepResult, TokenLogprobs
from brim.kernels.base import AttentionBatch, Kernels
from brim.models.base import Model, StepTensors
from brim.worker.kv_cache import KVCache
from brim.worker.programs import DecodePrograms
from brim.worker.sampler import Sampler, SampleRows, SpecialRow
from brim.worker.step_inputs import StepArrays, StepInputs


class ModelRunner:
    """The model over its KV cache. Not thread-safe: one step at a time."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        inputs: StepInputs,
        sampler: Sampler,
        buffers: Mapping[str, Tensor],
    ) -> None:
        self._model = model
        self._cache = cache
        self._inputs = inputs
        self._sampler = sampler
        self._buffers = buffers
        self._programs = DecodePrograms()

    @property
    def num_programs(self) -> int:
        """Recorded decode programs."""
        return len(self._programs)

    def record_decode(self, kernels: Kernels, max_num_seqs: int) -> None:
        """Record the whole decode step, sampling included, for each batch size whose logits fit the buffer at once.

        What was recorded before is forgotten."""
        self._programs.clear()
        self._programs.record(kernels, min(max_num_seqs, self._sampler.logit_rows), self._decode_body)

    def _decode_body(self, num_seqs: int, all_greedy: bool) -> None:
        inputs = self._inputs
        batches = inputs.batches(num_seqs, num_seqs, 1, inputs.max_model_len)
        hidden = self._model.forward(self._step_tensors(num_seqs, batches))
        self._sampler.sample_chunk_all(hidden, inputs.sample_rows[:num_seqs], all_greedy)

    def execute(self, plan: StepPlan) -> StepResult:
        """Run a scheduler's step: S sequences, T tokens -> ids of the R sampled rows."""
        for copy in plan.copies:
            self._cache.copy_block(copy.group, copy.source, copy.target)
        tables = tuple(table[plan.rows] for table in plan.table.block_tables)
        arrays = StepArrays(plan.token_ids, plan.query_lens, plan.start_positions, tables, plan.sample_indices)
        settings = self._settings(plan)
        num_rows = len(plan.sample_indices)
        if self._replay(arrays, settings):
            logprobs, prompt_logprobs = {}, {}
        else:
            hidden = self.forward(arrays)
            prompt_logprobs = {i: self._score_prompt(plan, i, hidden) for i in plan.prompt_logprob_indices}
            logprobs = self._sampler.sample(hidden, self._inputs.sample_rows[:num_rows], settings) if num_rows else {}
        self._sampler.mark_failed(num_rows)
        ids = self._sampler.ids[:num_rows].numpy().copy()
        failed = {int(plan.sample_indices[i]): "the model's output was not finite" for i in np.flatnonzero(ids < 0)}
        return StepResult(plan.step_id, ids, logprobs, prompt_logprobs, failed)

    def forward(self, arrays: StepArrays) -> Tensor:
        """Hidden states [T, hidden_size] of one step given as arrays."""
        batches = self._inputs.fill(arrays)
        return self._model.forward(self._step_tensors(len(arrays.token_ids), batches))

    def _step_tensors(self, num_tokens: int, batches: list[AttentionBatch]) -> StepTensors:
        return StepTensors(
            ids=self._inputs.ids[:num_tokens],
            positions=self._inputs.positions[:num_tokens],
            batches=batches,
            kv_caches=self._cache.layer_views,
            buffers=self._buffers,
        )

    def _replay(self, arrays: StepArrays, settings: SampleRows) -> bool:
        """Run the step as a recorded program where it is a plain decode of every sequence; False where it is not."""
        num_seqs = len(arrays.query_lens)
        if len(arrays.token_ids) != num_seqs or len(arrays.sample_indices) != num_seqs or settings.special:
            return False
        program = self._programs.get(num_seqs, not np.any(settings.temperature))
        if program is None:
            return False
        self._inputs.fill(arrays)
        self._sampler.set_params(settings)
        program.run()
        return True

    def probe(self, arrays: StepArrays, settings: SampleRows) -> None:
        """Run a fabricated step to its end, sampling included (measure and prove)."""
        if self._replay(arrays, settings):
            return
        hidden = self.forward(arrays)
        num_rows = len(arrays.sample_indices)
        self._sampler.sample(hidden, self._inputs.sample_rows[:num_rows], settings)

    def _score_prompt(self, plan: StepPlan, index: int, hidden: Tensor) -> list[TokenLogprobs]:
        sequence = plan.sequences[index]
        first_token = int(plan.query_lens[:index].sum())
        start = int(plan.start_positions[index])
        stop = min(start + int(plan.query_lens[index]), sequence.num_prompt_tokens - 1)
        targets = sequence.token_ids[start + 1 : stop + 1]
        num_best = sequence.params.prompt_logprobs or 0
        return self._sampler.prompt_logprobs(hidden[first_token : first_token + len(targets)], targets, num_best)

    def _settings(self, plan: StepPlan) -> SampleRows:
        rows = plan.rows[plan.sample_indices]
        table = plan.table
        special = []
        for i, index in enumerate(plan.sample_indices.tolist()):
            sequence = plan.sequences[index]
            if sequence.is_special:
                special.append(self._special_row(i, sequence))
        return SampleRows(
            temperature=table.temperature[rows],
            top_k=table.top_k[rows],
            top_p=table.top_p[rows],
            min_p=table.min_p[rows],
            seed=table.seed[rows],
            position=(plan.start_positions + plan.query_lens)[plan.sample_indices].astype(np.int64),
            special=tuple(special),
        )

    def _special_row(self, index: int, sequence: Sequence) -> SpecialRow:
        params = sequence.params
        banned: tuple[int, ...] = ()
        if sequence.num_output_tokens < params.min_tokens:
            banned = tuple(sequence.stop_ids)
        prompt = sequence.num_prompt_tokens
        return SpecialRow(index, params, sequence.token_ids[:prompt], sequence.output_ids, banned)
