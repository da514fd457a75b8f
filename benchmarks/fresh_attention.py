"""A candidate: flash attention of sequences whose whole context is new, over the step's own rows instead of the paged cache.

No block table lies between a tile and its addresses, so tiles come by bulk copies (TMA) where the device has them, and the plain
loop holds no mask. A program takes ROWS queries of one head. It finds its sequence as in
`prefill_attention`. Sequences with earlier tokens are left to that kernel. `cuda_tuning.py` times it; nothing else uses it.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from brim.kernels.triton.dependent import begin_dependent


@triton.jit
def _tile(source, row, column, stride, KEYS: tl.constexpr, D: tl.constexpr, BULK: tl.constexpr, length, MASKED: tl.constexpr):
    """[KEYS, D] from row `row` of keys or values: `source` is a descriptor with BULK, else a pointer. Rows from `length` on are
    zero where MASKED."""
    rows = row + tl.arange(0, KEYS)
    if BULK:
        tile = source.load([row, column])
        if MASKED:
            tile = tl.where((rows < length)[:, None], tile, tl.zeros([KEYS, D], tile.dtype))
    else:
        at = source + rows.to(tl.int64)[:, None] * stride + column + tl.arange(0, D)[None, :]
        if MASKED:
            tile = tl.load(at, mask=(rows < length)[:, None], other=0.0)
        else:
            tile = tl.load(at)
    return tile


@triton.jit
def _attend(
    acc, top, total, q, keys, values, token, end_row, column, stride, query_pos, begin, stop, inner, outer,
    KEYS: tl.constexpr, D: tl.constexpr, BULK: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold tiles begin..stop into the running sums (see `tiles.softmax_step`); no tile hides all keys from a row."""
    for tile in tl.range(begin, stop):
        row = token + tile * KEYS
        k = _tile(keys, row, column, stride, KEYS, D, BULK, end_row, MASKED and not BULK)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        factor = outer
        if SOFTCAP:
            scores = (2.0 / (1.0 + tl.exp(-2.0 * inner * scores)) - 1.0) * outer
            factor = 1.0
        if MASKED:
            place = tile * KEYS + tl.arange(0, KEYS)
            scores = tl.where(place[None, :] <= query_pos[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1) * factor)
        weights = tl.exp2(scores * factor - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, axis=1)
        v = _tile(values, row, column, stride, KEYS, D, BULK, end_row, MASKED)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["num_seqs"], do_not_specialize_on_alignment=["query_start", "seq_lens"])
def fresh_attention_kernel(
    q, keys, values, out, query_start, seq_lens, inner, outer, num_seqs, stride_q, stride_kv, stride_out,
    SEQS_PAD: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BULK: tl.constexpr, SOFTCAP: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (row blocks * HEADS), the last queries first. keys, values: pointers, or with BULK descriptors of [T, K * D] in tiles
    of [KEYS, D]. outer is positive."""
    begin_dependent(PDL)
    head = tl.program_id(0) % HEADS
    block = tl.num_programs(0) // HEADS - 1 - tl.program_id(0) // HEADS
    index = tl.arange(0, SEQS_PAD)
    starts = tl.load(query_start + index, mask=index < num_seqs, other=0)
    owned = (index < num_seqs) & (starts // ROWS + index <= block)
    seq = tl.sum(owned.to(tl.int32), axis=0) - 1
    token = tl.load(query_start + seq)
    length = tl.load(query_start + seq + 1) - token
    first = (block - (token // ROWS + seq)) * ROWS
    mine = (first < length) & (length > 1) & (length == tl.load(seq_lens + seq))
    query = first + tl.arange(0, ROWS)
    col = tl.arange(0, D)
    real = (mine & (query < length))[:, None]
    token_row = (token + query).to(tl.int64)[:, None]
    rows = tl.load(q + token_row * stride_q + head * D + col[None, :], mask=real, other=0.0)
    column = (head // GROUP) * D
    acc = tl.zeros([ROWS, D], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    plain_end = tl.where(mine, first // KEYS, 0)  # tiles before it lie before every query
    end = tl.where(mine, (tl.minimum(first + ROWS, length) + KEYS - 1) // KEYS, 0)
    acc, top, total = _attend(
        acc, top, total, rows, keys, values, token, token + length, column, stride_kv, query, 0, plain_end, inner, outer,
        KEYS, D, BULK, SOFTCAP, False,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, rows, keys, values, token, token + length, column, stride_kv, query, plain_end, end, inner, outer,
        KEYS, D, BULK, SOFTCAP, True,
    )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + token_row * stride_out + head * D + col[None, :], acc.to(out.dtype.element_ty), mask=real)
