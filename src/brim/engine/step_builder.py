"""Collects what one step computes and turns it into a StepPlan. Owns the order of a plan: decodes first, then chunks."""

from __future__ import annotations

import numpy as np

from brim.engine.sequence import Sequence
from brim.engine.sequence_table import SequenceTable
from brim.engine.step import StepPlan

UNKNOWN_TOKEN = -1


class StepBuilder:
    """One step being put together. Adding a sequence moves its num_computed_tokens and num_pending_tokens on."""

    __slots__ = ("_chunk_starts", "_chunk_tokens", "_chunks", "_decode_ids", "_decode_starts", "_decodes", "_step_id")

    def __init__(self, step_id: int) -> None:
        self._step_id = step_id
        self._decodes: list[Sequence] = []
        self._decode_starts: list[int] = []
        self._decode_ids: list[int] = []
        self._chunks: list[Sequence] = []
        self._chunk_starts: list[int] = []
        self._chunk_tokens: list[int] = []

    @property
    def is_empty(self) -> bool:
        """True where nothing would be computed."""
        return not self._decodes and not self._chunks

    def add_decode(self, sequence: Sequence) -> None:
        """The last token, known or still on the device, is computed and the next one sampled."""
        start = sequence.num_computed_tokens
        self._decodes.append(sequence)
        self._decode_starts.append(start)
        self._decode_ids.append(UNKNOWN_TOKEN if sequence.num_pending_tokens else sequence.last_token)
        sequence.num_computed_tokens = start + 1
        sequence.num_pending_tokens += 1
        sequence.last_step_id = self._step_id

    def add_chunk(self, sequence: Sequence, num_tokens: int) -> None:
        """The next num_tokens known tokens are computed; the next one is sampled where they reach the last known one."""
        start = sequence.num_computed_tokens
        self._chunks.append(sequence)
        self._chunk_starts.append(start)
        self._chunk_tokens.append(num_tokens)
        sequence.num_computed_tokens = start + num_tokens
        if start + num_tokens == sequence.num_tokens:
            sequence.num_pending_tokens += 1
        sequence.last_step_id = self._step_id

    def build(self, table: SequenceTable) -> StepPlan:
        """The plan; every array is made in one numpy call."""
        num_decodes = len(self._decodes)
        sequences = (*self._decodes, *self._chunks)
        query_lens = np.ones(len(sequences), dtype=np.int32)
        query_lens[num_decodes:] = self._chunk_tokens
        token_ids = np.array(self._decode_ids, dtype=np.int64)
        if self._chunks:
            parts = zip(self._chunks, self._chunk_starts, self._chunk_tokens, strict=True)
            token_ids = np.concatenate([token_ids, *(seq.token_ids[start : start + count] for seq, start, count in parts)])
        sampled = [*range(num_decodes)]
        sampled += [i for i, seq in enumerate(self._chunks, num_decodes) if seq.num_pending_tokens]
        return StepPlan(
            step_id=self._step_id,
            table=table,
            sequences=sequences,
            rows=np.array([seq.row for seq in sequences], dtype=np.int32),
            query_lens=query_lens,
            start_positions=np.array(self._decode_starts + self._chunk_starts, dtype=np.int32),
            token_ids=token_ids,
            sample_indices=np.array(sampled, dtype=np.int32),
            prompt_logprob_indices=self._prompt_logprob_indices(num_decodes),
        )

    def _prompt_logprob_indices(self, num_decodes: int) -> tuple[int, ...]:
        """Chunks of sequences that still owe prompt log-probabilities and hold a position whose successor is in the prompt."""
        return tuple(
            i
            for i, (seq, start) in enumerate(zip(self._chunks, self._chunk_starts, strict=True), num_decodes)
            if seq.prompt_logprobs is not None and start < seq.num_prompt_tokens - 1
        )
