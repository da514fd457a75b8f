"""What decode and prefill attention share: reading a tile of the paged cache, and one step of the running softmax."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def tile_pointers(
    cache, table, keys, visible, stride_block, stride_token: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, D_PAD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Addresses [keys, D_PAD] of K (V lies stride_kv further). Table entries of positions not visible are never read."""
    if MASKED:
        block = tl.load(table + keys // BLOCK_SIZE, mask=visible, other=0)
    else:
        block = tl.load(table + keys // BLOCK_SIZE)
    row = block.to(tl.int64) * stride_block + (keys % BLOCK_SIZE) * stride_token
    return cache + row[:, None] + tl.arange(0, D_PAD)[None, :]


@triton.jit
def load_tile(pointers, visible, D: tl.constexpr, D_PAD: tl.constexpr, MASKED: tl.constexpr):
    """A [keys, D_PAD] tile, zero where not visible or past D."""
    if MASKED:
        return tl.load(pointers, mask=visible[:, None] & (tl.arange(0, D_PAD) < D)[None, :], other=0.0)
    if D != D_PAD:
        return tl.load(pointers, mask=(tl.arange(0, D_PAD) < D)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def scaled_scores(q, k, inner, outer, SOFTCAP: tl.constexpr):
    """Scores in units of log2: outer * (q k), or outer * tanh(inner * (q k)) with a soft cap. float32."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SOFTCAP:
        scores = 2.0 / (1.0 + tl.exp(-2.0 * inner * scores)) - 1.0
    return scores * outer


@triton.jit
def softmax_step(scores, v, acc, top, total, GUARDED: tl.constexpr):
    """Fold one tile into the running sums: acc [rows, D_PAD], top (maximum) and total [rows], all float32."""
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    base = new_top
    if GUARDED:  # a row that has seen nothing yet
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return acc, new_top, total


@triton.jit
def attend_tiles(
    acc, top, total, q, cache, table, query_pos, begin, stop, inner, outer,
    stride_block, stride_kv: tl.constexpr, stride_token: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr, last_pos, lowest,
):  # fmt: skip
    """Fold tiles begin..stop into the running sums; MASKED where a tile holds keys that some row may not see."""
    for tile in tl.range(begin, stop):
        keys = tile * KEYS + tl.arange(0, KEYS)
        readable = (keys <= last_pos) & (keys >= lowest)
        at = tile_pointers(cache, table, keys, readable, stride_block, stride_token, BLOCK_SIZE, D_PAD, MASKED)
        k = load_tile(at, readable, D, D_PAD, MASKED).to(q.dtype)
        scores = scaled_scores(q, k, inner, outer, SOFTCAP)
        if MASKED:
            visible = keys[None, :] <= query_pos[:, None]
            if WINDOW:
                visible = visible & (keys[None, :] > query_pos[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        v = load_tile(at + stride_kv, readable, D, D_PAD, MASKED).to(q.dtype)
        acc, top, total = softmax_step(scores, v, acc, top, total, MASKED)
    return acc, top, total
