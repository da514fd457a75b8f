"""Matrix products of one row or few, bound by reading the weights.

    out = x @ weight.T                                  logits, and with few rows every product
    out = act(x @ gate.T) * (x @ up.T)                  gate and up of an MLP
    rows that are normed but for the division, see `hopper_product`: both of these, each row of a product divided
    one row: out = rms_norm(x) @ weight.T; out = act(rms_norm(x) @ gate.T) * (rms_norm(x) @ up.T); residual += x @ weight.T

One program makes a few output columns of all rows, so each weight is read once and each sum has one order, whatever the batch.
Under PDL a program asks for its weights before it waits for the kernels that make x.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from brim.kernels.triton.dependent import let_next_start, prefetch_rows, wait_for_earlier

SILU = tl.constexpr(1)
GELU = tl.constexpr(2)


@triton.jit
def _activated(gate, up, GATED: tl.constexpr):
    """act(gate) * up in float32; see `dense.gated_activation_kernel`."""
    argument = gate
    if GATED == GELU:
        argument = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate / (1.0 + tl.exp(-argument)) * up


@triton.jit
def _load(at, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(at, mask=inside, other=0.0)
    return tl.load(at)


@triton.jit
def _weight(at, inside, MASKED: tl.constexpr):
    """A tile of weights, read once and not kept in the cache."""
    if MASKED:
        return tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")
    return tl.load(at, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["num_rows"])
def skinny_product_kernel(
    x, weight, out, squares, eps, num_rows, stride_x, stride_weight, stride_out,
    COLS: tl.constexpr, DEPTH: tl.constexpr, ROWS_BLOCK: tl.constexpr, COLS_BLOCK: tl.constexpr, DEPTH_BLOCK: tl.constexpr,
    GATED: tl.constexpr, SQUARES: tl.constexpr, SQUARES_PAD: tl.constexpr, AHEAD: tl.constexpr, AHEAD_LINES: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (column blocks, row blocks), products by the matrix units. COLS: columns of out; GATED: weight has twice as many rows,
    gates first. SQUARES: 0, or x is weighed but not divided by its root mean square, and squares [rows, SQUARES] are parts of its
    sum of squares. AHEAD: columns of the weights asked for before the wait."""
    row = tl.program_id(1) * ROWS_BLOCK + tl.arange(0, ROWS_BLOCK)
    col = tl.program_id(0) * COLS_BLOCK + tl.arange(0, COLS_BLOCK)
    let_next_start(PDL)
    if PDL and AHEAD:
        prefetch_rows(weight, tl.minimum(col, COLS - 1), stride_weight, AHEAD, AHEAD_LINES)
        if GATED:
            prefetch_rows(weight, tl.minimum(col, COLS - 1) + COLS, stride_weight, AHEAD, AHEAD_LINES)
    wait_for_earlier(PDL)
    real = row < num_rows
    depth = tl.arange(0, DEPTH_BLOCK)
    even: tl.constexpr = DEPTH % DEPTH_BLOCK == 0
    masked: tl.constexpr = not even or COLS % COLS_BLOCK != 0
    x_at = x + row.to(tl.int64)[:, None] * stride_x + depth[None, :]
    w_at = weight + col.to(tl.int64)[:, None] * stride_weight + depth[None, :]
    parts = 0.0
    if SQUARES:  # asked for ahead of the weights, used after them
        part = tl.arange(0, SQUARES_PAD)
        has_part = real[:, None] & (part < SQUARES)[None, :]
        parts = tl.load(squares + row[:, None] * SQUARES + part[None, :], mask=has_part, other=0.0)
    acc = tl.zeros([ROWS_BLOCK, COLS_BLOCK], tl.float32)
    up = tl.zeros([ROWS_BLOCK, COLS_BLOCK], tl.float32)
    for begin in tl.range(0, DEPTH, DEPTH_BLOCK, num_stages=STAGES):
        deep = (begin + depth < DEPTH)[None, :]
        a = tl.load(x_at + begin, mask=real[:, None] if even else real[:, None] & deep, other=0.0)
        inside = (col < COLS)[:, None] & deep
        acc = tl.dot(a, tl.trans(_weight(w_at + begin, inside, masked)), acc, input_precision="ieee")
        if GATED:
            b = _weight(w_at + COLS * stride_weight + begin, inside, masked)
            up = tl.dot(a, tl.trans(b), up, input_precision="ieee")
    if SQUARES:
        factor = 1.0 / tl.sqrt(tl.sum(parts, axis=1) / DEPTH + eps)[:, None]
        acc, up = acc * factor, up * factor
    if GATED:
        acc = _activated(acc, up, GATED)
    at = out + row.to(tl.int64)[:, None] * stride_out + col[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=real[:, None] & (col < COLS)[None, :])


@triton.jit
def vector_product_kernel(
    x, norm, weight, out, eps, stride_weight,
    COLS: tl.constexpr, DEPTH: tl.constexpr, COLS_BLOCK: tl.constexpr, DEPTH_BLOCK: tl.constexpr,
    NORMED: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr, AHEAD: tl.constexpr, AHEAD_LINES: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """The same for one row, without the matrix units: weights go from memory to registers. Grid (column blocks). The first tile
    of weights is loaded before the wait. A norm costs no pass of its own: the product is made of x times the norm's weights, in
    float32, and divided by the root mean square at the end, when the squares are summed too. ADDED: out is the residual."""
    col = tl.program_id(0) * COLS_BLOCK + tl.arange(0, COLS_BLOCK)
    depth = tl.arange(0, DEPTH_BLOCK)
    even: tl.constexpr = DEPTH % DEPTH_BLOCK == 0
    masked: tl.constexpr = not even or COLS % COLS_BLOCK != 0
    w_at = weight + col.to(tl.int64)[:, None] * stride_weight + depth[None, :]
    inside = (col < COLS)[:, None] & (depth < DEPTH)[None, :]
    let_next_start(PDL)
    first = _weight(w_at, inside, masked)
    first_up = first
    if GATED:
        first_up = _weight(w_at + COLS * stride_weight, inside, masked)
    if PDL and AHEAD:
        prefetch_rows(weight, tl.minimum(col, COLS - 1), stride_weight, AHEAD, AHEAD_LINES)
        if GATED:
            prefetch_rows(weight, tl.minimum(col, COLS - 1) + COLS, stride_weight, AHEAD, AHEAD_LINES)
    wait_for_earlier(PDL)
    a = _load(x + depth, depth < DEPTH, not even).to(tl.float32)
    squares = a * a
    if NORMED:
        a *= _load(norm + depth, depth < DEPTH, not even)
    a = a[None, :]
    acc = first.to(tl.float32) * a
    up = acc
    if GATED:
        up = first_up.to(tl.float32) * a
    for begin in tl.range(DEPTH_BLOCK, DEPTH, DEPTH_BLOCK, num_stages=STAGES):
        inside = (col < COLS)[:, None] & (begin + depth < DEPTH)[None, :]
        a = _load(x + begin + depth, begin + depth < DEPTH, not even).to(tl.float32)
        squares += a * a
        if NORMED:
            a *= _load(norm + begin + depth, begin + depth < DEPTH, not even)
        a = a[None, :]
        acc += _weight(w_at + begin, inside, masked).to(tl.float32) * a
        if GATED:
            up += _weight(w_at + COLS * stride_weight + begin, inside, masked).to(tl.float32) * a
    factor = 1.0
    if NORMED:
        factor = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / DEPTH + eps)
    total = tl.sum(acc, axis=1) * factor
    if GATED:
        total = _activated(total, tl.sum(up, axis=1) * factor, GATED)
    kept = col < COLS
    if ADDED:
        total += tl.load(out + col, mask=kept, other=0.0).to(tl.float32)
    tl.store(out + col, total.to(out.dtype.element_ty), mask=kept)
