"""An executor without a device, for tests of everything above it. Owns a fake KV cache and a model that is only arithmetic.

The next token is a function of all token ids of the sequence so far, computed from what lies in the fake cache: position p of a
sequence stores p and chain(p) = chain(p-1) * R + id(p) + 1 (mod 2^64) in its slot of every KV group, chain(p-1) being read back
through the block table; a sampled token mixes chain over all positions a full group sees and over the window of a sliding one.
So a stale table, a block freed too early, a wrong prefix hit or a lost preemption changes tokens. Memory that was never written
or was uncommitted holds poison.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from brim.engine.sampling_params import SamplingParams
from brim.engine.sequence_table import SequenceTable
from brim.engine.step import BlockCopy, Executor, StepPlan, StepResult, TokenLogprobs
from brim.memory.kv_layout import KVLayout

_MASK = (1 << 64) - 1
_R = 0x9E3779B97F4A7C15  # odd, so it has an inverse mod 2^64
_R_INVERSE = pow(_R, -1, 1 << 64)
_POISON = 0xDEAD_BEEF_DEAD_BEEF
_NO_POSITION = -7


class FakeExecutor(Executor):
    """`faults[k]` is raised by the k-th step executed (from 0), after it has scribbled over the slots it should have written.

    `pressure` is what `pressure_bytes` answers; `unit_blocks` > 1 makes uncommitting stop at multiples of it, as large
    handles do.
    """

    gives_back = True

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: Sequence[int],
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int] = (),
        max_model_len: int = 4096,
        max_num_seqs: int = 1024,
        faults: Mapping[int, Exception] | None = None,
        unit_blocks: int = 1,
    ) -> None:
        self.layout = layout
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self.faults = dict(faults or {})
        self.pressure = 0
        self.unit_blocks = unit_blocks
        self.committed = tuple(num_blocks)
        self.num_executed = 0
        self.num_copied = 0
        self.closed = False
        size = layout.block_size
        self._chain = [np.full(count * size, _POISON, dtype=np.uint64) for count in num_blocks]
        self._position = [np.full(count * size, _NO_POSITION, dtype=np.int64) for count in num_blocks]
        self._last_token = np.zeros(max_num_seqs, dtype=np.int64)
        self._powers = np.cumprod(np.full(max_model_len + 1, _R, dtype=np.uint64))
        self._inverse_powers = np.cumprod(np.full(max_model_len + 1, _R_INVERSE, dtype=np.uint64))

    # -- the seam

    def execute(self, plan: StepPlan) -> StepResult:
        """Run the step over the fake cache."""
        self.copy_blocks(plan.copies)
        fault = self.faults.get(self.num_executed)
        self.num_executed += 1
        ends = np.cumsum(plan.query_lens)
        outputs = np.zeros(len(plan.sequences), dtype=np.uint64)
        for index, row in enumerate(plan.rows.tolist()):
            ids = plan.token_ids[ends[index] - plan.query_lens[index] : ends[index]]
            ids = np.where(ids < 0, self._last_token[row], ids)
            outputs[index] = self._forward(plan.table, row, int(plan.start_positions[index]), ids, scribble=fault is not None)
        if fault is not None:
            raise fault
        token_ids = np.array([self._sample(plan, i, int(outputs[i])) for i in plan.sample_indices.tolist()], dtype=np.int64)
        self._last_token[plan.rows[plan.sample_indices]] = token_ids
        return StepResult(plan.step_id, token_ids, self._logprobs(plan, token_ids), self._prompt_logprobs(plan))

    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        """Copy within the fake cache."""
        size = self.layout.block_size
        for copy in copies:
            source, target = (slice(b * size, (b + 1) * size) for b in (copy.source, copy.target))
            self._chain[copy.group][target] = self._chain[copy.group][source]
            self._position[copy.group][target] = self._position[copy.group][source]
            self.num_copied += 1

    def set_committed_blocks(self, blocks: tuple[int, ...]) -> tuple[int, ...]:
        """Uncommitted blocks are poisoned, and poison is what comes back."""
        size, unit = self.layout.block_size, self.unit_blocks
        kept = tuple(min(max(now, count), -(-count // unit) * unit) for now, count in zip(self.committed, blocks, strict=True))
        for group, (before, after) in enumerate(zip(self.committed, kept, strict=True)):
            chain, position = self._chain[group][: after * size], self._position[group][: after * size]
            grown = max(0, after - before) * size
            self._chain[group] = np.concatenate([chain, np.full(grown, _POISON, dtype=np.uint64)])
            self._position[group] = np.concatenate([position, np.full(grown, _NO_POSITION, dtype=np.int64)])
        self.committed = kept
        return kept

    def pressure_bytes(self) -> int:
        """What the test set."""
        return self.pressure

    def close(self) -> None:
        """Remember it."""
        self.closed = True

    # -- the fake model

    def _forward(self, table: SequenceTable, row: int, start: int, ids: NDArray[np.int64], *, scribble: bool) -> int:
        """Write chain for positions start .. start+len(ids)-1 into every group, then mix what the last position sees."""
        assert len(ids), "a step computes at least one token of a sequence"
        size, end = self.layout.block_size, start + len(ids)
        positions = np.arange(end)
        slots = [bt[row, positions // size].astype(np.int64) * size + positions % size for bt in table.block_tables]
        before = int(self._chain[0][slots[0][start - 1]]) if start else 0
        steps = np.cumsum((ids + 1).astype(np.uint64) * self._inverse_powers[: len(ids)])
        chain = self._powers[: len(ids)] * (np.uint64(before) + steps)
        mixed = 0
        for g, group in enumerate(self.layout.groups):
            assert table.block_tables[g][row, positions[start:] // size].all(), "a new token has no block"
            self._chain[g][slots[g][start:]] = _POISON if scribble else chain
            self._position[g][slots[g][start:]] = _NO_POSITION if scribble else positions[start:]
            first_seen = max(0, start - group.window + 1) if group.window else 0
            intact = np.array_equal(self._position[g][slots[g][first_seen:]], positions[first_seen:])
            same = not group.window or np.array_equal(
                self._chain[g][slots[g][first_seen:]], self._chain[0][slots[0][first_seen:]]
            )
            first_mixed = max(0, end - group.window) if group.window else 0
            values = self._chain[g][slots[g][first_mixed:]] * (2 * positions[first_mixed:] + 1).astype(np.uint64)
            mixed = (mixed * _R + int(values.sum(dtype=np.uint64)) + (0 if intact and same else _POISON)) & _MASK
        return mixed

    def _sample(self, plan: StepPlan, index: int, mixed: int) -> int:
        seq, row, table = plan.sequences[index], int(plan.rows[index]), plan.table
        num_output = int(plan.start_positions[index] + plan.query_lens[index]) - seq.num_prompt_tokens
        greedy = float(table.temperature[row]) == 0.0
        return _choose(
            mixed, None if greedy else int(table.seed[row]), num_output, seq.params, self.eos_token_ids, self.vocab_size
        )

    def _logprobs(self, plan: StepPlan, token_ids: NDArray[np.int64]) -> dict[int, TokenLogprobs]:
        wanted = {s: plan.sequences[i].params.logprobs for s, i in enumerate(plan.sample_indices.tolist())}
        return {s: self._score(int(token_ids[s]), count) for s, count in wanted.items() if count is not None}

    def _prompt_logprobs(self, plan: StepPlan) -> dict[int, list[TokenLogprobs]]:
        scores = {}
        for index in plan.prompt_logprob_indices:
            seq, start = plan.sequences[index], int(plan.start_positions[index])
            stop = min(start + int(plan.query_lens[index]), seq.num_prompt_tokens - 1)
            targets = seq.token_ids[start + 1 : stop + 1].tolist()
            scores[index] = [self._score(target, seq.params.prompt_logprobs or 0) for target in targets]
        return scores

    def _score(self, token: int, num_best: int) -> TokenLogprobs:
        best = tuple((token + i) % self.vocab_size for i in range(num_best))
        return TokenLogprobs(token, -1.0 / (1 + token), 1, best, tuple(-float(i) for i in range(num_best)))

    def alone(self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int, max_total_tokens: int) -> list[int]:
        """What a request must yield whatever runs beside it: the same arithmetic in plain integers, without any cache."""
        stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else self.eos_token_ids)}
        chain: list[int] = []
        output: list[int] = []
        for token in prompt_ids:
            chain.append(((chain[-1] if chain else 0) * _R + token + 1) & _MASK)
        while len(chain) < max_total_tokens:
            mixed = 0
            for group in self.layout.groups:
                first = max(0, len(chain) - group.window) if group.window else 0
                mixed = (mixed * _R + sum(c * (2 * p + 1) for p, c in enumerate(chain[first:], first))) & _MASK
            seed_used = None if params.is_greedy else seed
            token = _choose(mixed, seed_used, len(output), params, self.eos_token_ids, self.vocab_size)
            output.append(token)
            if token in stop_ids:
                break
            chain.append((chain[-1] * _R + token + 1) & _MASK)
        return output


def _choose(
    mixed: int, seed: int | None, num_output: int, params: SamplingParams, eos_token_ids: tuple[int, ...], vocab_size: int
) -> int:
    """A token id from a mix of the context; never a banned one while min_tokens holds them back."""
    z = (mixed + (0 if seed is None else (seed & _MASK) * _R)) & _MASK
    z = ((z ^ (z >> 29)) * 0xBF58476D1CE4E5B9) & _MASK
    token = ((z ^ (z >> 32)) & _MASK) % vocab_size
    banned = {*eos_token_ids, *params.stop_token_ids} if num_output < params.min_tokens else ()
    while token in banned:
        token = (token + 1) % vocab_size
    return token
