"""Launches attention: which kernels a batch needs, over which grid. Owns `AttentionLauncher`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from brim.kernels.base import AttentionBatch
from brim.kernels.triton.chunk_attention import chunk_attention_kernel
from brim.kernels.triton.decode_attention import decode_attention_kernel
from brim.kernels.triton.launch import Launch, launch_now
from brim.kernels.triton.prefill_attention import prefill_attention_kernel
from brim.kernels.triton.scratch import KernelLimits, Scratch
from brim.kernels.triton.tiles import LOG2_E
from brim.kernels.triton.tuning import (
    CHUNK_ROWS,
    CHUNK_TOKENS,
    AttentionTile,
    chunk_programs_per_core,
    chunk_tile,
    decode_tile,
    next_power_of_2,
    prefill_tile,
)
from brim.units import ceil_div

_COMBINE_ELEMENTS = 8192  # float32 values a program holds while it puts parts together


class PrefillLauncher(Protocol):
    """Another kernel for sequences with several new tokens, see `hopper_launch`."""

    def suits(self, q: Tensor, cache: Tensor, batch: AttentionBatch) -> bool:
        """Whether it is written for this."""

    def launch(self, q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, out: Tensor, *, least_queries: int) -> None:
        """Every sequence of at least so many new tokens."""


@dataclass(frozen=True, slots=True)
class AttentionLauncher:
    """Attention over one set of scratch buffers. The launches follow from bounds in the batch, never from its lengths."""

    limits: KernelLimits
    scratch: Scratch
    num_parts: int
    chunk_cores: int  # that chunk attention is cut for; 0: it is not used
    start: Launch = launch_now
    prefill: PrefillLauncher | None = None  # taken where it suits
    deep_chunks: bool = False  # see `chunk_tile`

    def launch(self, q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, softcap: float, out: Tensor) -> None:
        """Decode attention where a sequence may have one new token, prefill attention where one may have more."""
        assert batch.num_seqs <= self.limits.max_num_seqs, "more sequences than the kernels were made for"
        size = cache.element_size()
        kv_heads, head_dim = cache.shape[3], cache.shape[4]
        group = q.shape[1] // (kv_heads * head_dim)
        decodes = batch.max_query_len == 1 or batch.num_seqs > 1
        if decodes:
            tile = decode_tile(head_dim, group, size)
            self.launch_decode(q, cache, batch, scale, softcap, out, tile, self.num_parts)
        if batch.max_query_len > 1:
            chunk = chunk_tile(head_dim, group, size, batch.max_query_len, deep=self.deep_chunks)
            programs = self.chunk_cores * chunk_programs_per_core(chunk.rows, head_dim)
            if programs and (q.shape[0] <= CHUNK_TOKENS or batch.max_query_len * group <= CHUNK_ROWS):
                parts, least = max(1, programs // kv_heads), 2 if decodes else 0
                self.launch_chunk(q, cache, batch, scale, softcap, out, chunk, parts, least_queries=least)
                return
            if self.prefill is not None and softcap == 0 and self.prefill.suits(q, cache, batch):
                self.prefill.launch(q, cache, batch, scale, out, least_queries=2 if decodes else 0)
                return
            tile = prefill_tile(head_dim, group, size, batch.max_query_len)
            self.launch_prefill(q, cache, batch, scale, softcap, out, tile, skip_decodes=decodes)

    def launch_decode(
        self,
        q: Tensor,
        cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        softcap: float,
        out: Tensor,
        tile: AttentionTile,
        num_parts: int,
    ) -> None:
        """Sequences with one new token, with this tile and so many shares of the work of a KV head."""
        kv_heads, head_dim = cache.shape[3], cache.shape[4]
        group, width = q.shape[1] // (kv_heads * head_dim), next_power_of_2(head_dim)
        group_pad = next_power_of_2(group)
        together = max(1, min(next_power_of_2(num_parts), _COMBINE_ELEMENTS // (group_pad * width)))
        scratch = self.scratch
        self.start(
            decode_attention_kernel, (num_parts * kv_heads,), q, cache, out, batch.block_tables, batch.query_start,
            batch.seq_lens, scratch.sums, scratch.stats, scratch.arrivals, *_factors(scale, softcap), batch.num_seqs,
            q.stride(0), out.stride(0), batch.block_tables.stride(0), *cache.stride()[:4], PARTS=num_parts,
            SEQS_PAD=self._seqs_pad, KV_HEADS=kv_heads, GROUP=group, GROUP_PAD=group_pad, D=head_dim, D_PAD=width,
            ROWS=tile.rows, KEYS=tile.keys, TOGETHER=together, BLOCK_SIZE=batch.block_size, WINDOW=batch.window,
            SOFTCAP=softcap > 0, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def launch_chunk(
        self,
        q: Tensor,
        cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        softcap: float,
        out: Tensor,
        tile: AttentionTile,
        num_parts: int,
        *,
        least_queries: int,
    ) -> None:
        """Sequences of at least so many new tokens in a small step, with this tile and so many shares of a KV head's work."""
        kv_heads, head_dim = cache.shape[3], cache.shape[4]
        scratch = self.scratch
        self.start(
            chunk_attention_kernel, (num_parts * kv_heads,), q, cache, out, batch.block_tables, batch.query_start,
            batch.seq_lens, scratch.sums, scratch.stats, scratch.part_arrivals, *_factors(scale, softcap), batch.num_seqs,
            least_queries, q.stride(0), out.stride(0), batch.block_tables.stride(0), *cache.stride()[:4], PARTS=num_parts,
            SEQS_PAD=self._seqs_pad, KV_HEADS=kv_heads, GROUP=q.shape[1] // (kv_heads * head_dim), D=head_dim,
            D_PAD=next_power_of_2(head_dim), ROWS=tile.rows, KEYS=tile.keys, BLOCK_SIZE=batch.block_size, WINDOW=batch.window,
            SOFTCAP=softcap > 0, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def launch_prefill(
        self,
        q: Tensor,
        cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        softcap: float,
        out: Tensor,
        tile: AttentionTile,
        *,
        skip_decodes: bool,
    ) -> None:
        """Sequences of any number of new tokens, with this tile."""
        kv_heads, head_dim = cache.shape[3], cache.shape[4]
        group = q.shape[1] // (kv_heads * head_dim)
        queries = tile.rows // group
        num_blocks = min(q.shape[0] // queries, batch.num_seqs * ceil_div(batch.max_query_len, queries)) + batch.num_seqs
        self.start(
            prefill_attention_kernel, (num_blocks * kv_heads,), q, cache, out, batch.block_tables, batch.query_start,
            batch.seq_lens, *_factors(scale, softcap), batch.num_seqs, 2 if skip_decodes else 0, q.stride(0), out.stride(0),
            batch.block_tables.stride(0), *cache.stride()[:4], SEQS_PAD=self._seqs_pad,
            KV_HEADS=kv_heads, GROUP=group, D=head_dim, D_PAD=next_power_of_2(head_dim), ROWS=tile.rows, KEYS=tile.keys,
            BLOCK_SIZE=batch.block_size, WINDOW=batch.window, SOFTCAP=softcap > 0, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    @property
    def _seqs_pad(self) -> int:
        return next_power_of_2(self.limits.max_num_seqs)


def _factors(scale: float, softcap: float) -> tuple[float, float]:
    """(inner, outer) of `tiles.scaled_scores`."""
    if softcap > 0:
        return scale / softcap, softcap * LOG2_E
    return 1.0, scale * LOG2_E
