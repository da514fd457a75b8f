"""Attention of short chunks with long contexts. The work is cut evenly on the device, as `decode_attention` cuts it.

A chunk of a prompt, a hundred new tokens behind thousands of earlier ones, makes few blocks of rows for `prefill_attention`, and
each goes through the whole context alone. Here the key tiles of all blocks of rows form one line per KV head, and program p of P
takes the p-th equal share of it. Where a block's tiles cross a border its parts go to scratch, at most two a program, and the
program that finishes last puts them together. Every block counts all tiles of its sequence; those that its queries do not see
are passed over.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from brim.kernels.triton.dependent import begin_dependent
from brim.kernels.triton.tiles import attend_tiles


@triton.jit
def _first_tile(query_len, length, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """The first tile that a new token of the sequence sees."""
    if WINDOW:
        return tl.maximum(length - query_len - WINDOW + 1, 0) // KEYS
    return length * 0


@triton.jit
def _tiles_of(query_len, length, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """Tiles that each block of a sequence counts."""
    return (length + KEYS - 1) // KEYS - _first_tile(query_len, length, KEYS, WINDOW)


@triton.jit
def _line_of(query_len, length, least_queries, QUERIES: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """Tiles of all blocks of a sequence."""
    tiles = (query_len + QUERIES - 1) // QUERIES * _tiles_of(query_len, length, KEYS, WINDOW)
    return tl.where(query_len >= least_queries, tiles, 0)


@triton.jit
def _add_parts(
    sums, stats, first_part, parts, starts_inside, head, KV_HEADS: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr
):
    """The running sums of all parts of a block, one after the other."""
    row, col = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for part in tl.range(0, parts):
        slot = ((first_part + part) * 2 + tl.where(part == 0, starts_inside, 0)) * KV_HEADS + head
        part_top = tl.load(stats + slot * (2 * ROWS) + row, cache_modifier=".cg")
        part_total = tl.load(stats + slot * (2 * ROWS) + ROWS + row, cache_modifier=".cg")
        values = tl.load(sums + slot * (ROWS * D_PAD) + row[:, None] * D_PAD + col[None, :], cache_modifier=".cg")
        new_top = tl.maximum(top, part_top)
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight, shrink = tl.exp2(part_top - anchor), tl.exp2(top - anchor)
        total = total * shrink + weight * part_total
        acc = acc * shrink[:, None] + values * weight[:, None]
        top = new_top
    return acc, total


@triton.jit
def _finish(
    acc, top, total, to, inside, sums, stats, arrivals, head, part, start, count, share,
    KV_HEADS: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What becomes of a block's tiles, `count` from `start` on the line, of which this program summed its own."""
    row, col = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    first_part = start // share
    parts = (start + count - 1) // share - first_part + 1
    arrived = parts * 0
    if parts > 1:
        slot = (part * 2 + (start > part * share).to(tl.int32)) * KV_HEADS + head
        tl.store(sums + slot * (ROWS * D_PAD) + row[:, None] * D_PAD + col[None, :], acc)
        tl.store(stats + slot * (2 * ROWS) + row, top)
        tl.store(stats + slot * (2 * ROWS) + ROWS + row, total)
        tl.debug_barrier()  # all of this program's stores come before its arrival
        arrived = tl.atomic_add(arrivals + first_part * KV_HEADS + head, 1, sem="acq_rel")
        if arrived == parts - 1:
            starts_inside = (start > first_part * share).to(tl.int32)
            acc, total = _add_parts(sums, stats, first_part, parts, starts_inside, head, KV_HEADS, D_PAD, ROWS)
            tl.store(arrivals + first_part * KV_HEADS + head, 0)
    if arrived == parts - 1:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(to, acc.to(to.dtype.element_ty), mask=inside)


@triton.jit
def _cut(
    query_start, seq_lens, num_seqs, least_queries, part, PARTS: tl.constexpr, SEQS_PAD: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Tiles of a share, those of the line that are a program's, the sequence it begins with, and the tiles of all before that."""
    index = tl.arange(0, SEQS_PAD)
    real = index < num_seqs
    lens = tl.load(query_start + index + 1, mask=real, other=0) - tl.load(query_start + index, mask=real, other=0)
    tiles = _line_of(lens, tl.load(seq_lens + index, mask=real, other=0), least_queries, QUERIES, KEYS, WINDOW)
    line = tl.sum(tiles, axis=0)
    share = tl.maximum((line + PARTS - 1) // PARTS, 1)
    tile, stop = part * share, tl.minimum(part * share + share, line)
    seq = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    return share, tile, stop, seq, tl.sum(tl.where(index < seq, tiles, 0), axis=0)


@triton.jit
def _sum_tiles(
    rows, source, table, length, query_len, first, begin, end, inner, outer,
    stride_block, stride_kv: tl.constexpr, stride_token: tl.constexpr, QUERIES: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The running sums of tiles begin..end for the block of rows whose first query is `first`; what none of them sees is passed
    over."""
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    first_pos = length - query_len + first
    last_pos = tl.minimum(first_pos + QUERIES, length) - 1
    query_pos = first_pos + tl.arange(0, ROWS) // GROUP
    end = tl.minimum(end, last_pos // KEYS + 1)
    plain, lowest = begin, first_pos * 0
    if WINDOW:
        lowest = tl.maximum(first_pos - WINDOW + 1, 0)
        plain = tl.maximum(begin, lowest // KEYS)
    else:  # tiles before it lie before every query
        plain = tl.maximum(begin, tl.minimum((first_pos + 1) // KEYS, end))
        acc, top, total = attend_tiles(
            acc, top, total, rows, source, table, query_pos, begin, plain, inner, outer, stride_block, stride_kv,
            stride_token, D, D_PAD, KEYS, BLOCK_SIZE, WINDOW, SOFTCAP, False, last_pos, lowest,
        )  # fmt: skip
    return attend_tiles(
        acc, top, total, rows, source, table, query_pos, plain, end, inner, outer, stride_block, stride_kv,
        stride_token, D, D_PAD, KEYS, BLOCK_SIZE, WINDOW, SOFTCAP, True, last_pos, lowest,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["num_seqs", "least_queries", "stride_table"],
    do_not_specialize_on_alignment=["tables", "query_start", "seq_lens"],
)
def chunk_attention_kernel(
    q, cache, out, tables, query_start, seq_lens, sums, stats, arrivals, inner, outer, num_seqs, least_queries,
    stride_q, stride_out, stride_table, stride_block, stride_kv: tl.constexpr,
    stride_token: tl.constexpr, stride_head: tl.constexpr,
    PARTS: tl.constexpr, SEQS_PAD: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (PARTS * KV_HEADS). Sequences with fewer than least_queries new tokens are left to decode attention. Two slots a
    program: sums [slots, ROWS, D_PAD], stats [slots, 2, ROWS]; arrivals: one a program, left at zero."""
    begin_dependent(PDL)
    head, part = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    queries: tl.constexpr = ROWS // GROUP
    share, tile, stop, seq, before = _cut(
        query_start, seq_lens, num_seqs, least_queries, part, PARTS, SEQS_PAD, queries, KEYS, WINDOW
    )
    row, col = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    while tile < stop:
        token = tl.load(query_start + seq)
        query_len, length = tl.load(query_start + seq + 1) - token, tl.load(seq_lens + seq)
        of_seq = _line_of(query_len, length, least_queries, queries, KEYS, WINDOW)
        here = tl.minimum(stop, before + of_seq)
        if here > tile:
            count = _tiles_of(query_len, length, KEYS, WINDOW)
            block = (tile - before) // count
            start = before + block * count  # of this block's tiles on the line
            here = tl.minimum(here, start + count)
            query = block * queries + row // GROUP
            inside = ((row < queries * GROUP) & (query < query_len))[:, None] & (col < D)[None, :]
            cell = (head * GROUP + row % GROUP)[:, None] * D + col[None, :]
            token_row = (token + query).to(tl.int64)[:, None]
            rows = tl.load(q + token_row * stride_q + cell, mask=inside, other=0.0)
            offset = _first_tile(query_len, length, KEYS, WINDOW) - start
            acc, top, total = _sum_tiles(
                rows, cache + head * stride_head, tables + seq.to(tl.int64) * stride_table, length, query_len, block * queries,
                offset + tile, offset + here, inner, outer, stride_block, stride_kv, stride_token, queries, GROUP,
                D, D_PAD, ROWS, KEYS, BLOCK_SIZE, WINDOW, SOFTCAP,
            )  # fmt: skip
            to = out + token_row * stride_out + cell
            _finish(acc, top, total, to, inside, sums, stats, arrivals, head, part, start, count, share, KV_HEADS, D_PAD, ROWS)
        is_done = here == before + of_seq
        tile = tl.maximum(here, tile)
        before, seq = tl.where(is_done, before + of_seq, before), tl.where(is_done, seq + 1, seq)
