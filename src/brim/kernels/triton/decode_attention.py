"""Split-KV attention for sequences with one new token. The work is cut evenly on the device, so the grid is fixed.

All tiles of all such sequences, in order, form one line per KV head; program p of P takes the p-th equal share of it. A long
sequence is thereby spread over many programs and several short ones share one, whatever the batch holds. Where a sequence
crosses a border its parts go to scratch, at most two a program, and the program that finishes last puts them together. While
there is little work and programs enough, every sequence begins a share: two in a program cost more than an idle program.
Sequences with more than one new token count no tiles here: prefill attention owns them.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from brim.kernels.triton.dependent import let_next_start, prefetch_rows, wait_for_earlier
from brim.kernels.triton.tiles import load_tile, scaled_scores, softmax_step, tile_pointers


@triton.jit
def _first_tile(length, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    if WINDOW:
        return tl.maximum(length - WINDOW, 0) // KEYS
    return length * 0


@triton.jit
def _tile_count(queries, length, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """Tiles of a sequence; one even where its length is 0, so that its row is written."""
    count = tl.maximum((length + KEYS - 1) // KEYS - _first_tile(length, KEYS, WINDOW), 1)
    return tl.where(queries == 1, count, 0)


@triton.jit
def _share_of(line, seqs, PARTS: tl.constexpr):
    """Tiles a program takes, and whether each sequence begins with a share of its own, which may leave the last one short."""
    own = (line + PARTS - seqs - 1) // tl.maximum(PARTS - seqs, 1)
    apart = (2 * seqs <= PARTS) & (own <= 8)
    return tl.maximum(tl.where(apart, own, (line + PARTS - 1) // PARTS), 1), apart


@triton.jit
def _on_line(tiles, share, apart):
    """What a sequence takes of the line."""
    return tl.where(apart, (tiles + share - 1) // share * share, tiles)


@triton.jit
def _cut(
    query_start, seq_lens, num_seqs, part, PARTS: tl.constexpr, SEQS_PAD: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr
):
    """How the line is shared (see `_share_of`), the tiles of the line that are a program's, the sequence it begins with, and
    the tiles of all sequences before that one."""
    index = tl.arange(0, SEQS_PAD)
    real = index < num_seqs
    queries = tl.load(query_start + index + 1, mask=real, other=0) - tl.load(query_start + index, mask=real, other=0)
    tiles = _tile_count(queries, tl.load(seq_lens + index, mask=real, other=0), KEYS, WINDOW)
    share, apart = _share_of(tl.sum(tiles, axis=0), tl.sum((tiles > 0).to(tl.int32), axis=0), PARTS)
    tiles = _on_line(tiles, share, apart)
    tile, stop = part * share, tl.minimum(part * share + share, tl.sum(tiles, axis=0))
    seq = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    return share, apart, tile, stop, seq, tl.sum(tl.where(index < seq, tiles, 0), axis=0)


@triton.jit
def _attend(
    q, cache, table, length, begin, stop, inner, outer,
    stride_block, stride_kv: tl.constexpr, stride_token: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The running sums of tiles begin..stop of one sequence."""
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for tile in tl.range(begin, stop):
        keys = tile * KEYS + tl.arange(0, KEYS)
        visible = keys < length
        if WINDOW:
            visible = visible & (keys >= length - WINDOW)
        at = tile_pointers(cache, table, keys, visible, stride_block, stride_token, BLOCK_SIZE, D_PAD, True)
        k = load_tile(at, visible, D, D_PAD, True).to(q.dtype)
        v = load_tile(at + stride_kv, visible, D, D_PAD, True).to(q.dtype)
        scores = scaled_scores(q, k, inner, outer, SOFTCAP)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        acc, top, total = softmax_step(scores, v, acc, top, total, True)
    return acc, top, total


@triton.jit
def _store_part(
    acc, top, total, sums, stats, slot, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr
):
    """Unnormalised sums of one part to scratch slot: sums [slots, G, D], stats [slots, 2, G]."""
    row = tl.arange(0, ROWS)
    col = tl.arange(0, D_PAD)
    real = row < GROUP
    at = sums + slot * (GROUP * D) + row[:, None] * D + col[None, :]
    tl.store(at, acc, mask=real[:, None] & (col < D)[None, :])
    tl.store(stats + slot * (2 * GROUP) + row, top, mask=real)
    tl.store(stats + slot * (2 * GROUP) + GROUP + row, total, mask=real)


@triton.jit
def _combine(
    sums, stats, to, first_part, starts_inside, parts, head,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """Put the parts of one sequence together, TOGETHER at a time, and write out [G, D] at `to`."""
    row = tl.arange(0, GROUP_PAD)
    col = tl.arange(0, D_PAD)
    inside = (row < GROUP)[:, None] & (col < D)[None, :]
    acc = tl.zeros([GROUP_PAD, D_PAD], tl.float32)
    top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    for base in tl.range(0, parts, TOGETHER):
        part = base + tl.arange(0, TOGETHER)
        slot = ((first_part + part) * 2 + tl.where(part == 0, starts_inside, 0)) * KV_HEADS + head
        real = (part < parts)[:, None] & (row < GROUP)[None, :]
        at = stats + slot[:, None] * (2 * GROUP) + row[None, :]
        part_top = tl.load(at, mask=real, other=float("-inf"), cache_modifier=".cg")
        part_total = tl.load(at + GROUP, mask=real, other=0.0, cache_modifier=".cg")
        at = sums + slot[:, None, None] * (GROUP * D) + row[None, :, None] * D + col[None, None, :]
        values = tl.load(at, mask=(part < parts)[:, None, None] & inside[None, :, :], other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(part_top, axis=0))
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(part_top - anchor[None, :])
        shrink = tl.exp2(top - anchor)
        total = total * shrink + tl.sum(weight * part_total, axis=0)
        acc = acc * shrink[:, None] + tl.sum(weight[:, :, None] * values, axis=0)
        top = new_top
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(to + row[:, None] * D + col[None, :], acc.to(to.dtype.element_ty), mask=inside)


@triton.jit
def _finish(
    acc, top, total, to, inside, sums, stats, arrival, part, head, before, count, share,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    ROWS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """What becomes of a sequence's tiles, `count` after `before` on the line, of which this program summed its own; to: [G, D]
    of out; arrival: counts the sequence's parts."""
    first_part = before // share
    parts = (before + count - 1) // share - first_part + 1
    if parts == 1:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        cell = tl.arange(0, ROWS)[:, None] * D + tl.arange(0, D_PAD)[None, :]
        tl.store(to + cell, acc.to(to.dtype.element_ty), mask=inside)
    else:
        slot = (part * 2 + (before > part * share).to(tl.int32)) * KV_HEADS + head
        _store_part(acc, top, total, sums, stats, slot, GROUP, D, D_PAD, ROWS)
        tl.debug_barrier()  # all of this program's stores come before its arrival
        arrived = tl.atomic_add(arrival, 1, sem="acq_rel")
        if arrived == parts - 1:
            starts_inside = (before > first_part * share).to(tl.int32)
            _combine(sums, stats, to, first_part, starts_inside, parts, head, KV_HEADS, GROUP, GROUP_PAD, D, D_PAD, TOGETHER)
            tl.store(arrival, 0)


@triton.jit
def _ask_ahead(
    cache, tables, seq_lens, seq, tile, wanted, stride_table, stride_block, stride_kv: tl.constexpr, stride_token: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Ask for a tile of a sequence in the second-level cache, which what is still being written goes through too. Rows that are
    not wanted ask for block 0, which is always there."""
    lines: tl.constexpr = D_PAD // 64 if D_PAD >= 64 else 1
    length = tl.load(seq_lens + seq, mask=wanted, other=0)
    keys = (_first_tile(length, KEYS, WINDOW) + tile) * KEYS + tl.arange(0, KEYS)
    seen = (keys < length) & wanted
    if WINDOW:
        seen = seen & (keys >= length - WINDOW)
    block = tl.load(tables + seq.to(tl.int64) * stride_table + keys // BLOCK_SIZE, mask=seen, other=0)
    row = block.to(tl.int64) * stride_block + tl.where(seen, keys % BLOCK_SIZE, 0) * stride_token
    prefetch_rows(cache, row, 1, D, lines)
    prefetch_rows(cache + stride_kv, row, 1, D, lines)


@triton.jit(do_not_specialize=["num_seqs", "stride_table"], do_not_specialize_on_alignment=["tables", "query_start", "seq_lens"])
def decode_attention_kernel(
    q, cache, out, tables, query_start, seq_lens, sums, stats, arrivals, inner, outer, num_seqs,
    stride_q, stride_out, stride_table, stride_block, stride_kv: tl.constexpr,
    stride_token: tl.constexpr, stride_head: tl.constexpr,
    PARTS: tl.constexpr, SEQS_PAD: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, TOGETHER: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (PARTS * KV_HEADS): neighbours take the heads of the same share, whose rows of the cache lie side by side. Lengths
    are the step's input, which no kernel writes: the work is cut before the wait."""
    let_next_start(PDL)
    head, part = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    share, apart, tile, stop, seq, before = _cut(query_start, seq_lens, num_seqs, part, PARTS, SEQS_PAD, KEYS, WINDOW)
    row, col = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    inside = (row < GROUP)[:, None] & (col < D)[None, :]
    cell = row[:, None] * D + col[None, :]
    if PDL:
        _ask_ahead(
            cache + head * stride_head, tables, seq_lens, seq, tile - before, tile < stop, stride_table, stride_block, stride_kv,
            stride_token, D, D_PAD, KEYS, BLOCK_SIZE, WINDOW,
        )  # fmt: skip
    while tile < stop:
        token = tl.load(query_start + seq).to(tl.int64)
        length = tl.load(seq_lens + seq)
        real_count = _tile_count(tl.load(query_start + seq + 1) - token.to(tl.int32), length, KEYS, WINDOW)
        count = _on_line(real_count, share, apart)
        here = tl.minimum(stop, before + count)
        if here > tile:
            offset = _first_tile(length, KEYS, WINDOW) - before
            wait_for_earlier(PDL)  # again for each sequence, which costs nothing
            group = tl.load(q + token * stride_q + head * (GROUP * D) + cell, mask=inside, other=0.0)
            acc, top, total = _attend(
                group, cache + head * stride_head, tables + seq.to(tl.int64) * stride_table, length, offset + tile,
                offset + tl.minimum(here, before + real_count), inner, outer, stride_block, stride_kv, stride_token,
                D, D_PAD, ROWS, KEYS, BLOCK_SIZE, WINDOW, SOFTCAP,
            )  # fmt: skip
            _finish(
                acc, top, total, out + token * stride_out + head * (GROUP * D), inside, sums, stats,
                arrivals + seq * KV_HEADS + head, part, head, before, count, share, KV_HEADS, GROUP, GROUP_PAD, D, D_PAD, ROWS,
                TOGETHER,
            )  # fmt: skip
        tile, before, seq = here, before + count, seq + 1
    wait_for_earlier(PDL)  # also where there was nothing to do
