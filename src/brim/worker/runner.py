"""Runs one step on the device. Owns the order inside a step: copies, inputs, forward, logits, sampling.

Everything a step needs lives in buffers allocated before; a step allocates nothing on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from brim.engine.sequence import Sequence
from brim.engine.step import StepPlan, StepResult, TokenLogprobs
from brim.kernels.base import AttentionBatch, Kernels
from brim.models.base import Model, StepTensors
from brim.units import ceil_div
from brim.worker.decode_feed import DecodeFeed
from brim.worker.graph_choice import GraphChoice
from brim.worker.kv_cache import KVCache
from brim.worker.programs import Capture, StepPrograms
from brim.worker.sampler import Sampler, SampleRows, SpecialRow
from brim.worker.step_inputs import StepArrays, StepInputs, StepShape
from brim.worker.step_sizes import StepSizes


class ModelRunner:
    """The model over its KV cache. Not thread-safe: one step at a time."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        inputs: StepInputs,
        sampler: Sampler,
        buffers: Mapping[str, Tensor],
        sizes: StepSizes,
        kernels: Kernels,
        tokens_on_device: bool = False,
        feed: DecodeFeed | None = None,
    ) -> None:
        """tokens_on_device: steps may read ids that the host does not know yet. feed: captured decode steps read the host."""
        self._kernels = kernels
        self._tokens_on_device, self._feed = tokens_on_device, feed
        self._model = model
        self._cache = cache
        self._inputs = inputs
        self._sampler = sampler
        self._buffers = buffers
        self._sizes = sizes
        self._programs = StepPrograms()
        self._max_num_seqs = len(inputs.seq_lens)

    @property
    def num_programs(self) -> int:
        """Captured steps."""
        return len(self._programs)

    def forget_programs(self) -> None:
        """Give back what was captured."""
        self._programs.clear()

    def dense_step(self, num_tokens: int, num_wanted: int | None = None) -> StepTensors:
        """What the dense segments of a step of so many tokens read and write; whatever the buffers hold."""
        return self._step_tensors(num_tokens, self._inputs.batches(StepShape(num_tokens, 1, 1, 1)), num_wanted)

    def warm_sizes(self) -> None:
        """Run every product of a step in every size it can have: those of one layer, and the logits; and a last layer for one
        wanted row."""
        dense = [segment for segment in self._model.segments if not segment.is_attention]
        for num_tokens in self._sizes.tokens.values:
            step = self.dense_step(num_tokens)
            for segment in dense[:2]:
                segment.run(step)
        dense[-1].run(self.dense_step(len(self._inputs.ids), 1))
        for rows in self._sizes.rows.values:
            self._sampler.warm_rows(rows)

    def record(self, capture: Capture, choice: GraphChoice, greedy_kinds: tuple[bool, ...]) -> Iterator[str]:
        """Capture what the mode asks for over the present addresses, yielding what was captured; what was before is forgotten.

        Every kernel ran before in every size, so nothing is loaded or allocated inside a capture."""
        self._programs.clear()
        captures_mixed = choice.mixed_whole or choice.pieces
        total = len(self._sizes.decode) * choice.decode_whole + len(self._sizes.mixed) * captures_mixed
        counted = (f"{number} of {total}" for number in range(1, total + 1))
        if choice.decode_whole:
            recorded = self._programs.record_decode(capture, self._sizes.decode, greedy_kinds, self._decode_body)
            for num_seqs in recorded:
                yield f"{next(counted)}: decode, {num_seqs} sequences"
        if captures_mixed:
            for num_tokens in reversed(self._sizes.mixed):
                step = self._step_tensors(num_tokens, self._inputs.batches(self._mixed_shape(num_tokens)))
                if choice.mixed_whole:
                    self._programs.record_whole(capture, num_tokens, self._model, step)
                else:
                    self._programs.record_pieces(capture, num_tokens, self._model, step)
                yield f"{next(counted)}: {num_tokens} tokens"

    def _mixed_shape(self, num_tokens: int) -> StepShape:
        return StepShape(num_tokens, min(num_tokens, self._max_num_seqs), num_tokens, self._inputs.max_model_len)

    def _decode_shape(self, num_seqs: int) -> StepShape:
        return StepShape(num_seqs, num_seqs, 1, self._inputs.max_model_len)

    def _decode_body(self, num_seqs: int, all_greedy: bool) -> None:
        inputs, feed, shape = self._inputs, self._feed, self._decode_shape(num_seqs)
        if feed is not None:
            feed.begin(num_seqs)
            hidden = self._model.forward(self._step_tensors(num_seqs, inputs.batches(shape, inputs.one_each)))
            self._sampler.sample_chunk_all(hidden, inputs.row_numbers[:num_seqs], all_greedy)
            feed.end(num_seqs)
            return
        self._resolve(num_seqs)
        hidden = self._model.forward(self._step_tensors(num_seqs, inputs.batches(shape)))
        self._sampler.sample_chunk_all(hidden, inputs.sample_rows[:num_seqs], all_greedy)
        self._remember(num_seqs)

    def _resolve(self, num_seqs: int) -> None:
        """The ids of decoding sequences, which come first, become what was sampled for their rows."""
        if self._tokens_on_device:
            inputs = self._inputs
            self._kernels.resolve_ids(inputs.ids[:num_seqs], inputs.rows[:num_seqs], self._sampler.last_ids)

    def _resolve_unknown(self, arrays: StepArrays) -> None:
        if np.any(arrays.token_ids[: arrays.num_seqs] < 0):
            self._resolve(arrays.num_seqs)

    def _remember(self, num_rows: int) -> None:
        if self._tokens_on_device:
            rows = self._inputs.sampled_rows[:num_rows]
            self._kernels.remember_ids(self._sampler.ids[:num_rows], rows, self._sampler.last_ids)

    def execute(self, plan: StepPlan) -> StepResult:
        """Run a scheduler's step to its end."""
        return self.submit(plan)()

    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Queue a scheduler's step: S sequences, T tokens; the returned call waits for the ids of its R sampled rows.

        Rows that want more than an id are waited for here."""
        for copy in plan.copies:
            self._cache.copy_block(copy.group, copy.source, copy.target)
        used = ceil_div(int((plan.start_positions + plan.query_lens).max()), plan.table.layout.block_size)
        tables = tuple(table[plan.rows, :used] for table in plan.table.block_tables)
        arrays = StepArrays(plan.token_ids, plan.query_lens, plan.start_positions, tables, plan.sample_indices, plan.rows)
        settings = self._settings(plan)
        num_rows = len(plan.sample_indices)
        logprobs: dict[int, TokenLogprobs] = {}
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        read = self._replay(arrays, settings)
        if read is None:
            hidden, rows = self.forward(arrays, keeps_all=bool(plan.prompt_logprob_indices))
            prompt_logprobs = {i: self._score_prompt(plan, i, hidden) for i in plan.prompt_logprob_indices}
            if num_rows:
                logprobs = self._sample(hidden, rows, settings)
            read = self._sampler.start_read(num_rows)

        def wait() -> StepResult:
            ids = read()
            failed = {int(plan.sample_indices[i]): "the model's output was not finite" for i in np.flatnonzero(ids < 0)}
            return StepResult(plan.step_id, ids, logprobs, prompt_logprobs, failed)

        return wait

    def _sample(self, hidden: Tensor, rows: Tensor | None, settings: SampleRows) -> dict[int, TokenLogprobs]:
        logprobs = self._sampler.sample(hidden, rows, settings)
        self._remember(len(settings.temperature))
        return logprobs

    def forward(
        self, arrays: StepArrays, shape: StepShape | None = None, *, keeps_all: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """One step given as arrays; call by call where a shape to pad to is given.

        Hidden states, and which rows of them are sampled [R] int64: either those of all tokens [T, hidden_size], or, where the
        last layer is computed for less than all and keeps_all is false, of the sampled rows alone [R, hidden_size] and None."""
        num_rows = len(arrays.sample_indices)
        sampled = self._inputs.sample_rows[:num_rows]
        num_tokens, longest = arrays.num_tokens, int(arrays.query_lens.max())
        program = None if shape else self._programs.mixed(num_tokens)
        if program is None:
            shape = shape or StepShape(self._sizes.tokens.up(num_tokens), arrays.num_seqs, longest, 0)
            batches = self._inputs.fill(arrays, shape)
            self._resolve_unknown(arrays)
            num_wanted = None if keeps_all else self._num_wanted(num_rows, shape.num_tokens)
            step = self._step_tensors(shape.num_tokens, batches, num_wanted)
            if num_wanted and 2 * num_wanted <= num_tokens and int(arrays.sample_indices[-1]) == num_rows - 1:
                step = replace(step, wanted_batches=self._inputs.last_tokens(num_rows, batches[0].max_seq_len))
            hidden = self._model.forward(step)
            return (hidden[:num_tokens], sampled) if num_wanted is None else (hidden[:num_rows], None)
        size, mixed = program
        shape = self._mixed_shape(size) if mixed.is_whole else StepShape(size, arrays.num_seqs, longest, 0)
        batches = self._inputs.fill(arrays, shape)
        self._resolve_unknown(arrays)
        mixed.run(self._step_tensors(size, batches))
        return self._buffers["hidden"][:num_tokens], sampled

    def _num_wanted(self, num_rows: int, num_tokens: int) -> int | None:
        """Rows of the last layer where num_rows are sampled, in a size whose products are loaded; None: as many as tokens."""
        rounded = self._sizes.tokens.up(num_rows) if num_rows else 0
        return rounded if rounded < num_tokens and rounded <= self._max_num_seqs else None

    def _step_tensors(self, num_tokens: int, batches: list[AttentionBatch], num_wanted: int | None = None) -> StepTensors:
        return StepTensors(
            ids=self._inputs.ids[:num_tokens],
            positions=self._inputs.positions[:num_tokens],
            batches=batches,
            kv_caches=self._cache.layer_views,
            buffers=self._buffers,
            wanted=None if num_wanted is None else self._inputs.sample_rows[:num_wanted],
        )

    def _replay(self, arrays: StepArrays, settings: SampleRows) -> Callable[[], NDArray[np.int64]] | None:
        """Queue the step as a captured one where it is a plain decode of every sequence, see `Sampler.start_read`; else None."""
        num_seqs = arrays.num_seqs
        if arrays.num_tokens != num_seqs or len(arrays.sample_indices) != num_seqs or settings.special:
            return None
        found = self._programs.decode(num_seqs, not np.any(settings.temperature))
        if found is None:
            return None
        size, program = found
        if self._feed is not None:
            return self._feed.run(arrays, settings, size, program)
        self._inputs.fill(arrays, self._decode_shape(size))
        self._sampler.set_params(settings)
        program.replay()
        return self._sampler.start_read(num_seqs)

    def probe(self, arrays: StepArrays, settings: SampleRows, shape: StepShape | None = None) -> None:
        """Run a fabricated step to its end, sampling included (warm, measure and prove), padded to a shape where one is given.

        All rows are kept: no step of so many tokens does more."""
        read = self._replay(arrays, settings) if shape is None else None
        if read is None:
            self._sample(*self.forward(arrays, shape, keeps_all=True), settings)
            read = self._sampler.start_read(len(arrays.sample_indices))
        read()

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
        for i in np.flatnonzero(table.may_be_special[rows]).tolist():
            sequence = plan.sequences[plan.sample_indices[i]]
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
