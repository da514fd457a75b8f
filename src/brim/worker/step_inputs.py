"""The static input buffers of a step, and how a plan fills them. Owns the arrays the model reads that change every step.

Everything is numpy over the memory of torch tensors allocated once; no Python loop runs over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from brim.kernels.base import AttentionBatch
from brim.memory.footprint import StepLimits, input_bytes
from brim.memory.kv_layout import KVLayout
from brim.units import ceil_div


@dataclass(frozen=True, slots=True)
class StepArrays:
    """One step as arrays (S sequences, T tokens, R sampled rows): what a StepPlan or a worst-case probe amounts to.

    token_ids [T] int64; query_lens, start_positions [S] int32; block_tables: one [S, max_blocks] int32 a KV group;
    sample_indices [R] int32 into the sequences.
    """

    token_ids: NDArray[np.int64]
    query_lens: NDArray[np.int32]
    start_positions: NDArray[np.int32]
    block_tables: tuple[NDArray[np.int32], ...]
    sample_indices: NDArray[np.int32]


class StepInputs:
    """Host-memory input buffers. `num_bytes` is exact; construction touches every page."""

    def __init__(self, limits: StepLimits, layout: KVLayout) -> None:
        self._layout = layout
        self.max_model_len = limits.max_model_len
        self.max_blocks = ceil_div(limits.max_model_len, layout.block_size)
        seqs, tokens = limits.max_num_seqs, limits.max_num_tokens
        self.ids = torch.zeros(tokens, dtype=torch.int64)
        self.positions = torch.zeros(tokens, dtype=torch.int64)
        self.query_start = torch.zeros(seqs + 1, dtype=torch.int32)
        self.seq_lens = torch.zeros(seqs, dtype=torch.int32)
        self.sample_rows = torch.zeros(seqs, dtype=torch.int64)
        self.slot_mappings = [torch.zeros(tokens, dtype=torch.int64) for _ in layout.groups]
        self.block_tables = [torch.zeros(seqs, self.max_blocks, dtype=torch.int32) for _ in layout.groups]
        self._ids = self.ids.numpy()
        self._positions = self.positions.numpy()
        self._query_start = self.query_start.numpy()
        self._seq_lens = self.seq_lens.numpy()
        self._sample_rows = self.sample_rows.numpy()
        self._slot_mappings = [t.numpy() for t in self.slot_mappings]
        self._block_tables = [t.numpy() for t in self.block_tables]

    @property
    def num_bytes(self) -> int:
        """Bytes of all input buffers."""
        flat = [self.ids, self.positions, self.query_start, self.seq_lens, self.sample_rows]
        return sum(t.nbytes for t in (*flat, *self.slot_mappings, *self.block_tables))

    @staticmethod
    def bytes_for(limits: StepLimits, num_groups: int, block_size: int) -> int:
        """What a StepInputs of these limits holds, without building one."""
        return input_bytes(limits, num_groups, block_size)

    def fill(self, step: StepArrays) -> list[AttentionBatch]:
        """Write one step into the buffers; returns one AttentionBatch a KV group over views of them."""
        num_tokens, num_seqs = len(step.token_ids), len(step.query_lens)
        lens, starts = step.query_lens, step.start_positions
        self._ids[:num_tokens] = step.token_ids
        ends = self._query_start[1 : num_seqs + 1]
        np.cumsum(lens, out=ends)
        np.add(starts, lens, out=self._seq_lens[:num_seqs])
        owner: NDArray[np.int64] | slice = slice(0, num_seqs)
        if num_tokens == num_seqs:
            positions = starts
        else:
            owner = np.repeat(np.arange(num_seqs), lens)
            positions = np.arange(num_tokens) + np.repeat(starts - ends + lens, lens)
        self._positions[:num_tokens] = positions
        block_size = self._layout.block_size
        block_index, offset = np.divmod(positions, block_size)
        for slots, tables, source in zip(self._slot_mappings, self._block_tables, step.block_tables, strict=True):
            tables[:num_seqs] = source
            rows = np.arange(num_seqs) if isinstance(owner, slice) else owner
            slots[:num_tokens] = source[rows, block_index].astype(np.int64) * block_size + offset
        num_rows = len(step.sample_indices)
        self._sample_rows[:num_rows] = ends[step.sample_indices] - 1
        return self.batches(num_tokens, num_seqs, int(lens.max()), int(self._seq_lens[:num_seqs].max()))

    def batches(self, num_tokens: int, num_seqs: int, max_query_len: int, max_seq_len: int) -> list[AttentionBatch]:
        """Views of the buffers for a step of this size, one a KV group."""
        return [
            AttentionBatch(
                block_tables=self.block_tables[g][:num_seqs],
                slot_mapping=self.slot_mappings[g][:num_tokens],
                query_start=self.query_start[: num_seqs + 1],
                seq_lens=self.seq_lens[:num_seqs],
                num_seqs=num_seqs,
                max_query_len=max_query_len,
                max_seq_len=max_seq_len,
                block_size=self._layout.block_size,
                window=group.window,
            )
            for g, group in enumerate(self._layout.groups)
        ]
