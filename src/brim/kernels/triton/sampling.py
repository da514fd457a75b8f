"""Greedy and random sampling without sorting: best per chunk, threshold search, kept sums per chunk, inverse CDF.

With M the largest logit, p(x) = 2^((x - M) log2(e) / temperature) lies in [0, 1], and the bits of a float in [0, 1] order as
an integer below 2^30: its key. "Keep top k" is the largest key t with count(key >= t) >= k, "keep top p" the largest t with
mass(key >= t) >= top_p * mass(kept by top k). Each is found exactly, three bits a pass over the row, in ten passes at most,
and a pass reads only those parts of the row whose best id can still be kept: few, where a model is sure of itself.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from brim.kernels.triton.dependent import begin_dependent

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
def chunk_best_kernel(
    logits, best_value, best_id, part_best, vocab, stride_row, stride_chunk, stride_part,
    CHUNK: tl.constexpr, PART: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """The largest logit and its lowest id in each chunk, the largest in each part of it; grid (rows, chunks)."""
    begin_dependent(PDL)
    row, chunk = tl.program_id(0), tl.program_id(1)
    part = chunk * (CHUNK // PART) + tl.arange(0, CHUNK // PART)
    ids = part[:, None] * PART + tl.arange(0, PART)[None, :]
    x = tl.load(logits + row.to(tl.int64) * stride_row + ids, mask=ids < vocab, other=float("-inf"))
    part_bests = tl.max(x, axis=1)
    best = tl.max(part_bests, axis=0)
    tl.store(part_best + row * stride_part + part, part_bests)
    tl.store(best_value + row * stride_chunk + chunk, best)
    tl.store(best_id + row * stride_chunk + chunk, tl.min(tl.min(tl.where(x == best, ids, MAX_INT), axis=1), axis=0))


@triton.jit
def _narrow(reached, low, high, step, need):
    """The eighth of low..high that holds the border: reached [8] is the count or mass from each border low + i * step on."""
    passed = tl.sum((reached >= need).to(tl.int32), axis=0)
    low = tl.minimum(low + step * tl.maximum(passed - 1, 0), high - 1)
    return low, tl.minimum(high, low + step)


@triton.jit
def _search_parts(part_key, real, need):
    """The largest key t such that `need` parts have a best key of at least t."""
    low, high = (need * 0).to(tl.int32), (need * 0).to(tl.int32) + ONE_KEY + 1
    while high - low > 1:
        step = (high - low + 7) // 8
        border = low + step * tl.arange(0, 8)
        counted = (part_key[None, :] >= border[:, None]) & real[None, :]
        low, high = _narrow(tl.sum(counted.to(tl.float32), axis=1), low, high, step, need)
    return low


@triton.jit
def _list_parts(part_key, real, key, active):
    """Write the parts that hold a key of at least `key` to active; how many they are."""
    chosen = (real & (part_key >= key)).to(tl.int32)
    tl.debug_barrier()  # the list before this one has been read
    tl.store(active + tl.cumsum(chosen, axis=0) - 1, tl.arange(0, part_key.shape[0]), mask=chosen > 0)
    tl.debug_barrier()
    return tl.sum(chosen, axis=0)


@triton.jit
def _load_parts(logits, vocab, best, factor, floor, active, begin, count, PART: tl.constexpr, BLOCK: tl.constexpr):
    """p, keys [BLOCK] and which of them count, of the parts listed at active[begin..]."""
    place = begin + tl.arange(0, BLOCK // PART)
    part = tl.load(active + place, mask=place < count, other=0)
    ids = part[:, None] * PART + tl.arange(0, PART)[None, :]
    inside = (place < count)[:, None] & (ids < vocab)
    x = tl.reshape(tl.load(logits + ids, mask=inside, other=float("-inf")), [BLOCK])
    p, key = _keys(x, best, factor)
    return p, key, tl.reshape(inside, [BLOCK]) & (key >= floor)


@triton.jit
def _mass(logits, vocab, best, factor, floor, part_key, real, active, PART: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of p over keys >= floor."""
    total = tl.zeros([BLOCK], tl.float32)
    count = _list_parts(part_key, real, floor, active)
    for begin in tl.range(0, count, BLOCK // PART):
        p, _key, counts = _load_parts(logits, vocab, best, factor, floor, active, begin, count, PART, BLOCK)
        total += tl.where(counts, p, 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _search(
    logits, vocab, best, factor, floor, low, need, part_key, real, active,
    WEIGHTED: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key t >= low such that the count (or mass) of keys >= max(t, floor) reaches need; at low it does."""
    high = low * 0 + ONE_KEY + 1
    while high - low > 1:
        step = (high - low + 7) // 8
        border = low + step * tl.arange(0, 8)
        reached = tl.zeros([8, BLOCK], tl.float32)
        count = _list_parts(part_key, real, tl.maximum(low, floor), active)
        for begin in tl.range(0, count, BLOCK // PART):
            p, key, counts = _load_parts(logits, vocab, best, factor, floor, active, begin, count, PART, BLOCK)
            weight = tl.where(counts, p if WEIGHTED else 1.0, 0.0)
            reached += tl.where(key[None, :] >= border[:, None], weight[None, :], 0.0)
        low, high = _narrow(tl.sum(reached, axis=1), low, high, step, need)
    return low


@triton.jit
def _best_of_row(best_value, stride_chunk, row, chunks, CHUNKS_PAD: tl.constexpr):
    index = tl.arange(0, CHUNKS_PAD)
    return tl.max(tl.load(best_value + row * stride_chunk + index, mask=index < chunks, other=float("-inf")), axis=0)


@triton.jit(do_not_specialize_on_alignment=["temperature", "top_k", "top_p", "min_p"])
def threshold_kernel(
    logits, part_best, active, threshold, temperature, top_k, top_p, min_p, vocab, stride_row, stride_part, parts,
    PARTS_PAD: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """The least key a row keeps; one program a row. Rows that are greedy or keep everything cost nothing."""
    begin_dependent(PDL)
    row = tl.program_id(0)
    t = tl.load(temperature + row)
    k = tl.load(top_k + row)
    nucleus = tl.load(top_p + row)
    kept = tl.maximum(tl.load(min_p + row), 0.0).to(tl.int32, bitcast=True)
    is_top_k = (k > 0) & (k < vocab)
    if (t > 0.0) & (is_top_k | (nucleus < 1.0)):
        base, listed = logits + row.to(tl.int64) * stride_row, active + row * stride_part
        index = tl.arange(0, PARTS_PAD)
        real = index < parts
        bests = tl.load(part_best + row * stride_part + index, mask=real, other=float("-inf"))
        best = tl.max(bests, axis=0)
        factor = 1.4426950408889634 / t
        _p, part_key = _keys(bests, best, factor)
        floor = k * 0
        if is_top_k:
            low = floor
            if k <= parts:  # k parts reach this key, so k ids do
                low = _search_parts(part_key, real, k.to(tl.float32))
            floor = _search(base, vocab, best, factor, floor, low, k.to(tl.float32), part_key, real, listed, False, PART, BLOCK)
        if nucleus < 1.0:
            mass = _mass(base, vocab, best, factor, floor, part_key, real, listed, PART, BLOCK)
            # all ids below the first border together weigh less than half of what may be left out
            border = tl.minimum(tl.maximum(0.5 * (1.0 - nucleus) * mass / vocab, 0.0), 1.0).to(tl.int32, bitcast=True)
            low = tl.maximum(floor, tl.minimum(border, ONE_KEY))
            floor = _search(base, vocab, best, factor, floor, low, nucleus * mass, part_key, real, listed, True, PART, BLOCK)
        kept = tl.maximum(kept, floor)
    tl.store(threshold + row, tl.minimum(kept, ONE_KEY))


@triton.jit(do_not_specialize_on_alignment=["temperature"])
def chunk_sum_kernel(
    logits, best_value, threshold, sums, temperature, vocab, stride_row, stride_chunk, chunks,
    CHUNKS_PAD: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """The mass kept in each chunk; grid (rows, chunks)."""
    begin_dependent(PDL)
    row, chunk = tl.program_id(0), tl.program_id(1)
    t = tl.load(temperature + row)
    if t > 0.0:
        best = _best_of_row(best_value, stride_chunk, row, chunks, CHUNKS_PAD)
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + row.to(tl.int64) * stride_row + ids, mask=ids < vocab, other=float("-inf"))
        p, key = _keys(x, best, 1.4426950408889634 / t)
        tl.store(sums + row * stride_chunk + chunk, tl.sum(tl.where(key >= tl.load(threshold + row), p, 0.0), axis=0))


@triton.jit(do_not_specialize_on_alignment=["temperature", "seed", "position", "out"])
def pick_kernel(
    logits, best_value, best_id, threshold, sums, temperature, seed, position, out, vocab, stride_row, stride_chunk, chunks,
    CHUNKS_PAD: tl.constexpr, CHUNK: tl.constexpr, GREEDY: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """The row's id: the argmax, or the first id whose running mass passes uniform * total. One program a row."""
    begin_dependent(PDL)
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
            tokens = chunk * CHUNK + tl.arange(0, CHUNK)
            x = tl.load(logits + row.to(tl.int64) * stride_row + tokens, mask=tokens < vocab, other=float("-inf"))
            p, key = _keys(x, best, 1.4426950408889634 / t)
            p = tl.where(key >= tl.load(threshold + row), p, 0.0)
            reached = (before + tl.cumsum(p, axis=0) > target) & (p > 0.0)
            first = tl.min(tl.where(reached, tokens, MAX_INT), axis=0)
            last = tl.max(tl.where(p > 0.0, tokens, 0), axis=0)
            token = tl.minimum(first, last)
    tl.store(out + row, tl.minimum(token, vocab - 1).to(tl.int64))
