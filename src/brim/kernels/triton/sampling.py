"""Greedy and random sampling without sorting: best per chunk, threshold search, kept sums per chunk, inverse CDF.

With M the largest logit, p(x) = 2^((x - M) log2(e) / temperature) lies in [0, 1], and the bits of a float in [0, 1] order as
an integer below 2^30: its key. "Keep top k" is the largest key t with count(key >= t) >= k, "keep top p" the largest t with
mass(key >= t) >= top_p * mass(kept by top k). Each is found three bits a pass over the row, in ten passes, exactly.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

MAX_INT = tl.constexpr(2147483647)
ONE_KEY = tl.constexpr(0x3F800000)  # the key of p = 1


@triton.jit
def _shift_right(value, BITS: tl.constexpr):
    """Logical shift of int64 taken as uint64."""
    return (value >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit
def _splitmix64(state):
    z = state + (-7046029254386353131)
    z = (z ^ _shift_right(z, 30)) * (-4658895280553007687)
    z = (z ^ _shift_right(z, 27)) * (-7723592293110705685)
    return z ^ _shift_right(z, 31)


@triton.jit
def uniform(seed, position):
    """`uniform_from_seed`, bit for bit: int64, int64 -> float32 in [0, 1)."""
    return _shift_right(_splitmix64(_splitmix64(seed) + position), 40).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _keys(x, best, factor):
    """p of each logit, and its key."""
    p = tl.exp2((x - best) * factor)
    return p, p.to(tl.int32, bitcast=True)


@triton.jit
def chunk_best_kernel(logits, best_value, best_id, vocab, stride_row, stride_chunk, CHUNK: tl.constexpr):
    """The largest logit and its lowest id in each chunk; grid (rows, chunks)."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row.to(tl.int64) * stride_row + ids, mask=ids < vocab, other=float("-inf"))
    best = tl.max(x, axis=0)
    tl.store(best_value + row * stride_chunk + chunk, best)
    tl.store(best_id + row * stride_chunk + chunk, tl.min(tl.where(x == best, ids, MAX_INT), axis=0))


@triton.jit
def _search(logits, vocab, best, factor, floor, need, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key t such that the count (or mass) of keys >= max(t, floor) reaches need."""
    low = tl.full([], 0, tl.int32)
    step = tl.arange(0, 8)
    for digit in tl.range(0, 10):
        border = low + (step << (27 - 3 * digit))
        reached = tl.zeros([8, BLOCK], tl.float32)
        for begin in tl.range(0, vocab, BLOCK):
            ids = begin + tl.arange(0, BLOCK)
            x = tl.load(logits + ids, mask=ids < vocab, other=float("-inf"))
            p, key = _keys(x, best, factor)
            weight = tl.where((ids < vocab) & (key >= floor), p if WEIGHTED else 1.0, 0.0)
            reached += tl.where(key[None, :] >= border[:, None], weight[None, :], 0.0)
        passed = (tl.sum(reached, axis=1) >= need).to(tl.int32)
        low += tl.maximum(tl.sum(passed, axis=0) - 1, 0) << (27 - 3 * digit)
    return tl.minimum(low, ONE_KEY)


@triton.jit
def _mass(logits, vocab, best, factor, floor, BLOCK: tl.constexpr):
    """Sum of p over keys >= floor."""
    total = tl.zeros([BLOCK], tl.float32)
    for begin in tl.range(0, vocab, BLOCK):
        ids = begin + tl.arange(0, BLOCK)
        x = tl.load(logits + ids, mask=ids < vocab, other=float("-inf"))
        p, key = _keys(x, best, factor)
        total += tl.where(key >= floor, p, 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _best_of_row(best_value, stride_chunk, row, chunks, CHUNKS_PAD: tl.constexpr):
    index = tl.arange(0, CHUNKS_PAD)
    return tl.max(tl.load(best_value + row * stride_chunk + index, mask=index < chunks, other=float("-inf")), axis=0)


@triton.jit
def threshold_kernel(
    logits, best_value, threshold, temperature, top_k, top_p, min_p, vocab, stride_row, stride_chunk, chunks,
    CHUNKS_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The least key a row keeps; one program a row. Rows that are greedy or keep everything cost nothing."""
    row = tl.program_id(0)
    t = tl.load(temperature + row)
    k = tl.load(top_k + row)
    nucleus = tl.load(top_p + row)
    kept = tl.maximum(tl.load(min_p + row), 0.0).to(tl.int32, bitcast=True)
    if t > 0.0:
        base = logits + row.to(tl.int64) * stride_row
        best = _best_of_row(best_value, stride_chunk, row, chunks, CHUNKS_PAD)
        factor = 1.4426950408889634 / t
        floor = tl.full([], 0, tl.int32)
        if (k > 0) & (k < vocab):
            floor = _search(base, vocab, best, factor, floor, k.to(tl.float32), False, BLOCK)
        if nucleus < 1.0:
            need = nucleus * _mass(base, vocab, best, factor, floor, BLOCK)
            floor = tl.maximum(floor, _search(base, vocab, best, factor, floor, need, True, BLOCK))
        kept = tl.maximum(kept, floor)
    tl.store(threshold + row, tl.minimum(kept, ONE_KEY))


@triton.jit
def chunk_sum_kernel(
    logits, best_value, threshold, sums, temperature, vocab, stride_row, stride_chunk, chunks,
    CHUNKS_PAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The mass kept in each chunk; grid (rows, chunks)."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    t = tl.load(temperature + row)
    if t > 0.0:
        best = _best_of_row(best_value, stride_chunk, row, chunks, CHUNKS_PAD)
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + row.to(tl.int64) * stride_row + ids, mask=ids < vocab, other=float("-inf"))
        p, key = _keys(x, best, 1.4426950408889634 / t)
        tl.store(sums + row * stride_chunk + chunk, tl.sum(tl.where(key >= tl.load(threshold + row), p, 0.0), axis=0))


@triton.jit
def pick_kernel(
    logits, best_value, best_id, threshold, sums, temperature, seed, position, out, vocab, stride_row, stride_chunk, chunks,
    CHUNKS_PAD: tl.constexpr, CHUNK: tl.constexpr, GREEDY: tl.constexpr,
):  # fmt: skip
    """The row's id: the argmax, or the first id whose running mass passes uniform * total. One program a row."""
    row = tl.program_id(0)
    index = tl.arange(0, CHUNKS_PAD)
    real = index < chunks
    bests = tl.load(best_value + row * stride_chunk + index, mask=real, other=float("-inf"))
    best = tl.max(bests, axis=0)
    ids = tl.load(best_id + row * stride_chunk + index, mask=real, other=MAX_INT)
    token = tl.min(tl.where(bests == best, ids, MAX_INT), axis=0)
    if not GREEDY:
        t = tl.load(temperature + row)
        if t > 0.0:
            mass = tl.load(sums + row * stride_chunk + index, mask=real, other=0.0)
            target = uniform(tl.load(seed + row), tl.load(position + row)) * tl.sum(mass, axis=0)
            passed = tl.sum((tl.cumsum(mass, axis=0) <= target).to(tl.int32), axis=0)
            chunk = tl.minimum(passed, tl.max(tl.where(mass > 0.0, index, 0), axis=0))
            before = tl.sum(tl.where(index < chunk, mass, 0.0), axis=0)
            ids = chunk * CHUNK + tl.arange(0, CHUNK)
            x = tl.load(logits + row.to(tl.int64) * stride_row + ids, mask=ids < vocab, other=float("-inf"))
            p, key = _keys(x, best, 1.4426950408889634 / t)
            p = tl.where(key >= tl.load(threshold + row), p, 0.0)
            reached = (before + tl.cumsum(p, axis=0) > target) & (p > 0.0)
            first = tl.min(tl.where(reached, ids, MAX_INT), axis=0)
            last = tl.max(tl.where(p > 0.0, ids, 0), axis=0)
            token = tl.minimum(first, last)
    tl.store(out + row, tl.minimum(token, vocab - 1).to(tl.int64))
