"""A plain matrix product for what the vendor library does not offer: float32 results of 16-bit operands, without temporaries."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from brim.kernels.triton.dependent import begin_dependent


@triton.jit(do_not_specialize=["num_rows"])
def matmul_kernel(
    x, weight, bias, out, num_rows, stride_x, stride_weight, stride_out,
    COLS: tl.constexpr, DEPTH: tl.constexpr, ROWS_BLOCK: tl.constexpr, COLS_BLOCK: tl.constexpr, DEPTH_BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """out[T, N] = x[T, K] @ weight[N, K].T (+ bias[N] f32); grid (column blocks, row blocks). Accumulates in float32."""
    begin_dependent(PDL)
    row = tl.program_id(1) * ROWS_BLOCK + tl.arange(0, ROWS_BLOCK)
    col = tl.program_id(0) * COLS_BLOCK + tl.arange(0, COLS_BLOCK)
    depth = tl.arange(0, DEPTH_BLOCK)
    x_at = x + row.to(tl.int64)[:, None] * stride_x + depth[None, :]
    w_at = weight + col.to(tl.int64)[:, None] * stride_weight + depth[None, :]
    acc = tl.zeros([ROWS_BLOCK, COLS_BLOCK], tl.float32)
    for begin in tl.range(0, DEPTH, DEPTH_BLOCK):
        inside = (begin + depth < DEPTH)[None, :]
        a = tl.load(x_at + begin, mask=(row < num_rows)[:, None] & inside, other=0.0)
        b = tl.load(w_at + begin, mask=(col < COLS)[:, None] & inside, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + col, mask=col < COLS, other=0.0)[None, :]
    at = out + row.to(tl.int64)[:, None] * stride_out + col[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(row < num_rows)[:, None] & (col < COLS)[None, :])
