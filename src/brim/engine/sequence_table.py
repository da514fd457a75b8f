"""Per-row arrays of the running sequences. Owns rows and the fixed numpy arrays the worker reads; not who gets a row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from brim.engine.sequence import NO_ROW, Sequence
from brim.memory.kv_layout import KVLayout
from brim.units import ceil_div


class SequenceTable:
    """Arrays by row, all allocated and touched once, here. N = max_num_seqs.

    block_tables[g] int32 [N, max_blocks]: block of positions i*B .. i*B+B-1; 0 where there is none (yet, or no longer).
    temperature f32, top_k i32 (0 off), top_p f32, min_p f32, seed i64 [N]: how to sample. last_token i64, num_tokens i64 [N]:
    what the host knows of the row, one step late at pipeline depth 2. may_be_special bool [N]: `Sequence.is_special` may hold.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, layout: KVLayout) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.layout = layout
        self.max_blocks = ceil_div(max_model_len, layout.block_size)
        self.block_tables = tuple(_touched((max_num_seqs, self.max_blocks), np.int32) for _ in layout.groups)
        self.temperature = _touched((max_num_seqs,), np.float32)
        self.top_k = _touched((max_num_seqs,), np.int32)
        self.top_p = _touched((max_num_seqs,), np.float32)
        self.min_p = _touched((max_num_seqs,), np.float32)
        self.seed = _touched((max_num_seqs,), np.int64)
        self.may_be_special = _touched((max_num_seqs,), np.bool_)
        self.last_token = _touched((max_num_seqs,), np.int64)
        self.num_tokens = _touched((max_num_seqs,), np.int64)
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays (host memory)."""
        params = (self.temperature, self.top_k, self.top_p, self.min_p, self.seed, self.may_be_special)
        return sum(array.nbytes for array in (*self.block_tables, *params, self.last_token, self.num_tokens))

    @property
    def num_free_rows(self) -> int:
        """Rows that a sequence could take now."""
        return len(self._free_rows)

    def take_row(self, sequence: Sequence) -> int:
        """Give the sequence the lowest rows first, write its sampling parameters there, and return the row."""
        assert sequence.row == NO_ROW, "the sequence has a row already"
        row = self._free_rows.pop()
        params = sequence.params
        self.temperature[row] = 0.0 if params.is_greedy else params.temperature
        self.top_k[row] = max(params.top_k, 0)
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.seed[row] = sequence.seed
        self.may_be_special[row] = sequence.may_be_special
        self.last_token[row] = sequence.last_token
        self.num_tokens[row] = sequence.num_tokens
        sequence.row = row
        return row

    def release_row(self, row: int) -> None:
        """Take the row back; its block tables must have been cleared by the block manager."""
        assert row not in self._free_rows, "the row was released twice"
        self._free_rows.append(row)


def _touched(shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """Zeros whose pages are really there: `np.zeros` alone leaves them to the first write."""
    array = np.empty(shape, dtype=dtype)
    array.fill(0)
    return array
