"""Launches prefill attention for Hopper: what it is written for, and the cache as its copies see it. Owns `HopperLauncher`.

Imported only where it is used: Gluon takes 0.06 s to import.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from brim.kernels.base import AttentionBatch
from brim.kernels.triton.hopper_attention import HEAD_DIM, PANEL, hopper_attention_kernel
from brim.kernels.triton.launch import Launch
from brim.kernels.triton.tiles import LOG2_E
from brim.kernels.triton.tuning import HOPPER_TILE, AttentionTile
from brim.units import ceil_div

_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@dataclass(frozen=True, slots=True)
class HopperLauncher:
    """Attention of sequences with several new tokens. seqs_pad: a power of two, at least the most sequences there can be."""

    start: Launch
    seqs_pad: int
    tile: AttentionTile = HOPPER_TILE

    def suits(self, q: Tensor, cache: Tensor, batch: AttentionBatch) -> bool:
        """Whether the kernel is written for this: heads of 128, 16-bit values, full attention, more rows than one group of warps
        takes, and rows of the cache that lie evenly, so that a block is found by the number of its first row."""
        kv_heads, head_dim = cache.shape[3], cache.shape[4]
        group = q.shape[1] // (kv_heads * head_dim)
        block, kv, row = cache.stride(0), cache.stride(1), cache.stride(2)
        even = row == kv_heads * head_dim and cache.stride(3) == head_dim and block % row == 0 and kv % row == 0
        whole_blocks = batch.block_size >= 8 and self.tile.keys % batch.block_size == 0
        right = head_dim == HEAD_DIM.value and cache.dtype in _TYPES and q.dtype == cache.dtype and not batch.window
        fits = group & (group - 1) == 0 and group <= self.tile.rows
        return even and whole_blocks and right and fits and self.tile.rows // 2 < batch.max_query_len * group

    def launch(self, q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, out: Tensor, *, least_queries: int) -> None:
        """Every sequence of at least so many new tokens. Only where it `suits`; there is no soft cap."""
        kv_heads, head_dim = cache.shape[3], cache.shape[4]
        group = q.shape[1] // (kv_heads * head_dim)
        queries = self.tile.rows // group
        num_blocks = min(q.shape[0] // queries, batch.num_seqs * ceil_div(batch.max_query_len, queries)) + batch.num_seqs
        self.start(
            hopper_attention_kernel, (num_blocks * kv_heads,), q, _rows(cache[:, 0]), _rows(cache[:, 1]), out,
            batch.block_tables, batch.query_start, batch.seq_lens, scale * LOG2_E, batch.num_seqs, least_queries,
            q.stride(0), out.stride(0), batch.block_tables.stride(0), cache.stride(0) // cache.stride(2),
            SEQS_PAD=max(32, self.seqs_pad), KV_HEADS=kv_heads, GROUP=group, KEYS=self.tile.keys, STAGES=self.tile.stages,
            BLOCK_SIZE=batch.block_size, num_warps=self.tile.warps,
        )  # fmt: skip


def _rows(cache: Tensor) -> TensorDescriptor:
    """Keys or values [blocks, B, K, D] of one layer as evenly spaced rows of K * D, to be copied a block and 64 columns at
    once."""
    blocks, size, kv_heads, head_dim = cache.shape
    row = cache.stride(1)
    shape = [(blocks - 1) * (cache.stride(0) // row) + size, kv_heads * head_dim]
    return TensorDescriptor(cache, shape, [row, 1], [size, PANEL.value], _layout(size, cache.dtype))


@lru_cache
def _layout(rows: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Of a tile in shared memory; made anew it is a third of a launch."""
    return gl.NVMMASharedLayout.get_default_for([rows, PANEL.value], _TYPES[dtype])
