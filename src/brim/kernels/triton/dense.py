"""Element-wise and row kernels: embedding, norms, gated activation, gather, bias. One pass over memory each."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from brim.kernels.triton.dependent import begin_dependent


@triton.jit(do_not_specialize_on_alignment=["rows"])
def gather_kernel(
    source, rows, out, scale, stride_source, stride_out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """out[i] = source[rows[i]] (* scale); grid (rows, column blocks)."""
    begin_dependent(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < WIDTH
    picked = tl.load(rows + row).to(tl.int64)
    x = tl.load(source + picked * stride_source + cols, mask=inside)
    if SCALED:
        x = x.to(tl.float32) * scale
    tl.store(out + row * stride_out + cols, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _normed(x, weight, cols, inside, eps, WIDTH: tl.constexpr):
    """RMS norm of one float32 row in registers; entries outside are zero."""
    mean_square = tl.sum(x * x, axis=0) / WIDTH
    w = tl.load(weight + cols, mask=inside, other=0.0)
    return x * (1.0 / tl.sqrt(mean_square + eps)) * w


@triton.jit
def rms_norm_kernel(
    x, weight, out, eps, stride_x, stride_out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr = False
):
    """One program a row. The row is read whole before anything is written, so out may be x."""
    begin_dependent(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < WIDTH
    values = tl.load(x + row * stride_x + cols, mask=inside, other=0.0).to(tl.float32)
    normed = _normed(values, weight, cols, inside, eps, WIDTH)
    tl.store(out + row * stride_out + cols, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_rms_norm_kernel(
    x, residual, weight, post_weight, out, eps, stride_x, stride_residual, stride_out,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_POST: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """residual += x or its norm, rounded; out = norm of that. One program a row."""
    begin_dependent(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < WIDTH
    added = tl.load(x + row * stride_x + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_POST:
        added = _normed(added, post_weight, cols, inside, eps, WIDTH)
    at = residual + row * stride_residual + cols
    total = (tl.load(at, mask=inside, other=0.0).to(tl.float32) + added).to(residual.dtype.element_ty)
    tl.store(at, total, mask=inside)
    normed = _normed(total.to(tl.float32), weight, cols, inside, eps, WIDTH)
    tl.store(out + row * stride_out + cols, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_activation_kernel(
    gate_up, out, stride_in, stride_out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr, PDL: tl.constexpr = False
):
    """out = act(gate) * up; grid (rows, column blocks). gelu_tanh(x) = x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)."""
    begin_dependent(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < WIDTH
    gate = tl.load(gate_up + row * stride_in + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride_in + WIDTH + cols, mask=inside, other=0.0).to(tl.float32)
    argument = gate
    if GELU:
        argument = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    active = gate / (1.0 + tl.exp(-argument))
    tl.store(out + row * stride_out + cols, (active * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_bias_kernel(out, bias, stride_out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr = False):
    """out[T, N] += bias[N] f32; grid (rows, column blocks)."""
    begin_dependent(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < WIDTH
    at = out + row * stride_out + cols
    total = tl.load(at, mask=inside, other=0.0).to(tl.float32) + tl.load(bias + cols, mask=inside, other=0.0)
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)
