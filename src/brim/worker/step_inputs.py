"""The static input buffers of a step, and how a plan fills them. Owns the arrays the model reads that change every step.

The host writes through numpy, the device reads its own copy (host memory: the same memory); no Python loop runs over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from brim.kernels.base import AttentionBatch
from brim.memory.kv_layout import KVLayout
from brim.memory.step_memory import StepLimits, arrays_bytes, input_arrays
from brim.worker.mirror import Mirror

_LITTLE_BYTES = 1 << 18  # take less time to move than another copy takes to start, on device and host


@dataclass(frozen=True, slots=True)
class StepArrays:
    """One step as arrays (S sequences, T tokens, R sampled rows): what a StepPlan or a worst-case probe amounts to.

    token_ids [T] int64; query_lens, start_positions [S] int32; block_tables: one [S, blocks] int32 a KV group, at least
    as wide as the longest sequence needs (what lies beyond is never read);
    sample_indices [R] int32 into the sequences. A token id of -1 stands for the last one sampled for the sequence's row.
    """

    token_ids: NDArray[np.int64]
    query_lens: NDArray[np.int32]
    start_positions: NDArray[np.int32]
    block_tables: tuple[NDArray[np.int32], ...]
    sample_indices: NDArray[np.int32]
    rows: NDArray[np.int32] | None = None  # [S] of the sequence table; None: a fabricated step, in nobody's row

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def num_seqs(self) -> int:
        """S."""
        return len(self.query_lens)


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a graph was captured for: sizes and bounds that a step is padded to.

    Padding tokens write no KV and padding sequences have length 0: they attend to nothing.
    """

    num_tokens: int
    num_seqs: int
    max_query_len: int
    max_seq_len: int


class StepInputs:
    """Input buffers of the largest step. `num_bytes` is exact; construction touches every page."""

    def __init__(self, limits: StepLimits, layout: KVLayout, device: torch.device, num_sets: int = 1) -> None:
        self._layout = layout
        self.max_model_len = limits.max_model_len
        self._nobody = limits.max_num_seqs
        groups = range(len(layout.groups))
        arrays = input_arrays(limits, len(groups), layout.block_size)
        dtypes = {name: torch.int64 if array[0] == 8 else torch.int32 for name, array in arrays.items()}
        self._mirror = Mirror(arrays, dtypes, device, num_sets)
        on_device = self._mirror.device
        self.ids = on_device["ids"]
        self.positions = on_device["positions"]
        self.query_start = on_device["query_start"]
        self.turn = on_device["turn"]
        self.one_each = torch.arange(limits.max_num_seqs + 1, out=on_device["one_each"])
        self.row_numbers = torch.arange(limits.max_num_seqs, out=on_device["row_numbers"])
        self.seq_lens = on_device["seq_lens"]
        self.sample_rows = on_device["sample_rows"]
        self.rows = on_device["rows"]
        self.sampled_rows = on_device["sampled_rows"]
        self.slot_mappings = [on_device[f"slots_{g}"] for g in groups]
        self.block_tables = [on_device[f"tables_{g}"] for g in groups]

    @property
    def num_bytes(self) -> int:
        """Bytes of all input buffers on the device."""
        return self._mirror.num_bytes

    @staticmethod
    def bytes_for(limits: StepLimits, num_groups: int, block_size: int) -> int:
        """What a StepInputs of these limits holds, without building one."""
        return arrays_bytes(input_arrays(limits, num_groups, block_size))

    def fill(self, step: StepArrays, padded: StepShape | None = None) -> list[AttentionBatch]:
        """Write one step into the buffers, padded to a shape where one is given; one AttentionBatch a KV group over views."""
        self._mirror.turn()
        host = self._mirror.host
        num_tokens, num_seqs = step.num_tokens, step.num_seqs
        lens, starts = step.query_lens, step.start_positions
        shape = padded or StepShape(num_tokens, num_seqs, int(lens.max()), 0)
        host["ids"][:num_tokens] = step.token_ids
        host["ids"][num_tokens : shape.num_tokens] = 0  # padding is embedded too: an id that there is
        ends = host["query_start"][1 : num_seqs + 1]
        np.cumsum(lens, out=ends)
        seq_lens = np.add(starts, lens, out=host["seq_lens"][:num_seqs])
        for group, table in enumerate(step.block_tables):
            host[f"tables_{group}"][:num_seqs, : table.shape[1]] = table
        self._fill_places(step, starts - ends + lens, shape)
        num_rows = len(step.sample_indices)
        host["sample_rows"][:num_rows] = ends[step.sample_indices] - 1
        host["sample_rows"][num_rows:] = 0  # padding rows are read too: a row that there is
        rows = self._nobody if step.rows is None else step.rows
        host["rows"][:num_seqs] = rows
        host["sampled_rows"][:num_rows] = rows if step.rows is None else step.rows[step.sample_indices]
        if shape.num_seqs > num_seqs:
            self._pad(num_tokens, num_seqs, num_rows, shape)
        self._upload(num_seqs, shape.num_tokens)
        return self.batches(
            StepShape(shape.num_tokens, shape.num_seqs, shape.max_query_len, shape.max_seq_len or int(seq_lens.max()))
        )

    def _fill_places(self, step: StepArrays, offsets: NDArray[Any], shape: StepShape) -> None:
        """Each token's position and where its K and V go. offsets [S]: what a sequence's positions are ahead of its tokens."""
        host, num_tokens = self._mirror.host, step.num_tokens
        rows = np.arange(step.num_seqs)
        if num_tokens != step.num_seqs:
            rows, offsets = np.repeat(rows, step.query_lens), np.repeat(offsets, step.query_lens)
        positions = host["positions"][:num_tokens]
        np.add(np.arange(num_tokens), offsets, out=positions)
        block_size = self._layout.block_size
        block_index = positions // block_size
        offset = positions - block_index * block_size
        for group, source in enumerate(step.block_tables):
            slots = host[f"slots_{group}"]
            blocks = np.take(source, rows * source.shape[1] + block_index)
            np.multiply(blocks, block_size, out=slots[:num_tokens], dtype=np.int64)
            slots[:num_tokens] += offset
            slots[num_tokens : shape.num_tokens] = -1

    def _pad(self, num_tokens: int, num_seqs: int, num_rows: int, shape: StepShape) -> None:
        """Sequences beyond num_seqs: no length; one query each in a decode step (its row is written as zeros), else none."""
        host, step = self._mirror.host, 1 if shape.max_query_len == 1 else 0
        more = np.arange(1, shape.num_seqs - num_seqs + 1)
        host["query_start"][num_seqs + 1 : shape.num_seqs + 1] = num_tokens + step * more
        host["seq_lens"][num_seqs : shape.num_seqs] = 0
        host["rows"][num_seqs : shape.num_seqs] = self._nobody
        host["sampled_rows"][num_rows : shape.num_seqs] = self._nobody

    def _upload(self, num_seqs: int, num_tokens: int) -> None:
        """In one copy for the first KV group, unless most of it would be what no token owns."""
        mirror, groups = self._mirror, range(len(self.slot_mappings))
        unused_bytes = (len(self.ids) - num_tokens) * self.ids.element_size() * (2 + len(groups))
        if unused_bytes <= _LITTLE_BYTES:
            mirror.upload_span("query_start", "tables_0", num_seqs)
        else:
            mirror.upload_span("query_start", "ids", num_tokens)
            for name in ("positions", *(f"slots_{group}" for group in groups)):
                mirror.upload(name, num_tokens)
            mirror.upload("tables_0", num_seqs)
        for group in groups[1:]:
            mirror.upload(f"tables_{group}", num_seqs)

    def last_tokens(self, num_seqs: int, max_seq_len: int) -> list[AttentionBatch]:
        """The step that is filled, with the last token alone of each of the first num_seqs sequences."""
        return self.batches(StepShape(num_seqs, num_seqs, 1, max_seq_len), self.one_each)

    def batches(self, shape: StepShape, query_start: torch.Tensor | None = None) -> list[AttentionBatch]:
        """Views of the buffers for a step of this shape, one a KV group. query_start: another than the one that is filled."""
        starts = self.query_start if query_start is None else query_start
        return [
            AttentionBatch(
                block_tables=self.block_tables[g][: shape.num_seqs],
                slot_mapping=self.slot_mappings[g][: shape.num_tokens],
                query_start=starts[: shape.num_seqs + 1],
                seq_lens=self.seq_lens[: shape.num_seqs],
                num_seqs=shape.num_seqs,
                max_query_len=shape.max_query_len,
                max_seq_len=shape.max_seq_len,
                block_size=self._layout.block_size,
                window=group.window,
            )
            for g, group in enumerate(self._layout.groups)
        ]
