"""Both ends of a captured decode step: its inputs come from host memory and its ids go there. See `HostFeed`.

Host memory is read past the caches: between two launches of a graph the host has written it.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from brim.kernels.triton.dependent import begin_dependent


@triton.jit
def _move(host, to, at, row):
    tl.store(to + row, tl.load(host + at, cache_modifier=".cv"))


_UNALIGNED = [
    "ids",
    "rows",
    "seeds",
    "ends",
    "lens",
    "top_k",
    "temperature",
    "top_p",
    "min_p",
    "positions",
    "slots",
    "table",
    "last_ids",
]


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def begin_decodes_kernel(
    turn, host_ids, host_rows, host_seeds, host_lens, host_top_k, host_temperature, host_top_p, host_min_p, host_table,
    ids, rows, seeds, ends, lens, top_k, temperature, top_p, min_p, positions, slots, table, last_ids,
    stride_set, stride_table, BLOCK_SIZE: tl.constexpr, NEAR: tl.constexpr, FAR: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Grid (rows). FIRST: with all that is the same for every KV group; else the block table and the slot of one more. The way
    to the host is long: the first NEAR entries of a table are asked for before its length is there, then FAR at a time. Never
    launched early, nor is what comes next: later kernels read lengths, places and tables before they wait."""
    row = tl.program_id(0)
    at = tl.load(turn).to(tl.int64) * stride_set + row
    source = host_table + at * stride_table
    index = tl.arange(0, NEAR)
    near = tl.load(source + index, mask=index < stride_table, other=0, cache_modifier=".cv")
    length = tl.load(host_lens + at, cache_modifier=".cv")
    last = tl.maximum(length - 1, 0)
    if FIRST:
        token = tl.load(host_ids + at, cache_modifier=".cv")
        home = tl.load(host_rows + at, cache_modifier=".cv")
        _move(host_seeds, seeds, at, row)
        _move(host_top_k, top_k, at, row)
        _move(host_temperature, temperature, at, row)
        _move(host_top_p, top_p, at, row)
        _move(host_min_p, min_p, at, row)
        tl.store(lens + row, length)
        tl.store(ends + row, length.to(tl.int64))
        tl.store(positions + row, last.to(tl.int64))
        tl.store(rows + row, home)
        known = tl.load(last_ids + home, mask=token < 0, other=0)
        tl.store(ids + row, tl.where(token < 0, known, token))
    count = (length + BLOCK_SIZE - 1) // BLOCK_SIZE
    to = table + row.to(tl.int64) * stride_table
    tl.store(to + index, near, mask=index < count)
    for begin in tl.range(NEAR, count, FAR):
        more = begin + tl.arange(0, FAR)
        tl.store(to + more, tl.load(source + more, mask=more < count, other=0, cache_modifier=".cv"), mask=more < count)
    place = last // BLOCK_SIZE
    block = tl.sum(tl.where(tl.arange(0, NEAR) == place, near, 0), axis=0)
    if place >= NEAR:
        block = tl.load(source + place, cache_modifier=".cv")
    tl.store(slots + row, tl.where(length > 0, block.to(tl.int64) * BLOCK_SIZE + last % BLOCK_SIZE, -1))


@triton.jit(do_not_specialize=["num_sets"], do_not_specialize_on_alignment=["ids", "rows", "last_ids"])
def end_decodes_kernel(
    turn, hidden, ids, rows, last_ids, host_sampled, stride_hidden, stride_set, num_sets,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (rows). The last row to end gives the turn to the next set: all others have read it by then."""
    begin_dependent(PDL)
    row = tl.program_id(0)
    own = tl.load(turn)
    col = tl.arange(0, BLOCK)
    x = tl.load(hidden + row.to(tl.int64) * stride_hidden + col, mask=col < WIDTH, other=0.0)
    total = tl.sum(x.to(tl.float32), axis=0)
    token = tl.load(ids + row)
    tl.store(last_ids + tl.load(rows + row), token)
    tl.store(host_sampled + own.to(tl.int64) * stride_set + row, tl.where(tl.abs(total) < float("inf"), token, -1))
    tl.debug_barrier()
    ended = tl.atomic_add(turn + 1, 1, sem="acq_rel")
    if ended == tl.num_programs(0) - 1:
        tl.store(turn + 1, 0)
        tl.store(turn, tl.where(own + 1 == num_sets, 0, own + 1))
