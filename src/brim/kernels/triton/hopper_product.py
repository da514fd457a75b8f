"""Matrix products of few rows with narrow results, for Hopper: bound by reading the weights, which start to come before the rows.

A result of 1,024 columns gives too few programs to fill the chip unless the depth is cut too. The matrix instructions take 64
columns of out as their rows, and the 8 or 16 rows of x as their columns. All pieces of 64 columns and 64 of the depth form one
line, which is cut evenly over a fixed grid. Where a border lies inside a column block, its parts go to scratch, at most two a
program, and the program that finishes last adds them in order.

One warp copies weights and rows into a ring in shared memory; four others multiply. Under PDL the ring is filled with weights
before the wait for the kernels that make x. Written in Gluon, as `hopper_attention`; the tests run it on a model of the chip.

Where the product is added to a residual that is normed next, whoever has the sums of a column block does its part of that too: it
adds, multiplies by the norm's weights, and sums the squares of each row. Dividing is left to the reader (`skinny`).
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, assignment"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

TILE = gl.constexpr(64)  # columns of out a matrix instruction takes, and depth that lies together: 128 bytes, the widest swizzle
PLAIN = gl.constexpr(gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]))  # in which results are written, 16 bytes a thread


@gluon.jit
def _copy_weights(weights, w_ring, ready, stage, piece, STEPS: gl.constexpr, ROWS: gl.constexpr):
    """A piece of the line into a stage; its rows of x are expected too."""
    mbarrier.expect(ready.index(stage), (TILE + ROWS) * TILE * 2)
    at = [piece // STEPS * TILE, piece % STEPS * TILE]
    tma.async_copy_global_to_shared(weights, at, ready.index(stage), w_ring.index(stage))


@gluon.jit
def _copy_pieces(
    weights, rows, w_ring, x_ring, ready, free, begin, stop,
    STEPS: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The copying warp: pieces begin..stop of the line."""
    first = gl.minimum(stop - begin, STAGES)
    for i in range(first):
        _copy_weights(weights, w_ring, ready, i, begin + i, STEPS, ROWS)
    if PDL:
        gdc_wait()
    for i in range(first):
        tma.async_copy_global_to_shared(rows, [0, (begin + i) % STEPS * TILE], ready.index(i), x_ring.index(i))
    for i in range(first, stop - begin):
        stage = i % STAGES
        mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)
        _copy_weights(weights, w_ring, ready, stage, begin + i, STEPS, ROWS)
        tma.async_copy_global_to_shared(rows, [0, (begin + i) % STEPS * TILE], ready.index(stage), x_ring.index(stage))


@gluon.jit
def _part(sums, slot, num_rows, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """Where the sums [TILE, ROWS] of a part lie in sums [slots, TILE, ROWS], and which of them are real."""
    col = gl.arange(0, TILE, gl.SliceLayout(1, LAYOUT))[:, None]
    row = gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))[None, :]
    return sums + slot * (TILE * ROWS) + col * ROWS + row, (row < num_rows) & (col < TILE)


@gluon.jit
def _add_parts(
    sums, first_part, parts, starts_inside, num_rows, ROWS: gl.constexpr, TOGETHER: gl.constexpr, LAYOUT: gl.constexpr
):
    """All parts of a column block in order, TOGETHER loads under way at a time."""
    total = gl.zeros([TILE, ROWS], gl.float32, LAYOUT)
    for base in range(0, parts, TOGETHER):
        loaded = ()
        for j in gl.static_range(TOGETHER):
            slot = (first_part + base + j) * 2 + gl.where(base + j == 0, starts_inside, 0)
            at, real = _part(sums, slot, num_rows, ROWS, LAYOUT)
            loaded += (gl.load(at, mask=real & (base + j < parts), other=0.0, cache_modifier=".cg"),)
        for j in gl.static_range(TOGETHER):
            total = total + loaded[j]
    return total


@gluon.jit
def _columns(tile, num_rows, COLS: gl.constexpr, ROWS: gl.constexpr):
    """Column block `tile` [TILE, ROWS] of rows of COLS: its columns, rows, and which of them are real."""
    col = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(1, PLAIN))
    row = gl.arange(0, ROWS, gl.SliceLayout(0, PLAIN))
    return col, row, (col < COLS)[:, None] & (row < num_rows)[None, :]


@gluon.jit
def _neighbours(residual, norm, tile, num_rows, stride_residual, COLS: gl.constexpr, ROWS: gl.constexpr):
    """The residual and the norm's weights of a column block. Asked for ahead: it takes as long as all else."""
    col, row, inside = _columns(tile, num_rows, COLS, ROWS)
    at = residual + row.to(gl.int64)[None, :] * stride_residual + col[:, None]
    return gl.load(at, mask=inside, other=0.0), gl.load(norm + col, mask=col < COLS, other=0.0)


@gluon.jit
def _store_columns(
    out, values, residual, squares, before, weight, tile, num_rows, stride_out, stride_residual,
    COLS: gl.constexpr, ROWS: gl.constexpr, ADDED: gl.constexpr,
):  # fmt: skip
    """values [TILE, ROWS] to column block `tile` of out [num_rows, COLS]. ADDED: residual = before + values, rounded, out that
    times the norm's weights, and squares [ROWS, column blocks] the sums of its squares."""
    col, row, inside = _columns(tile, num_rows, COLS, ROWS)
    to_row = row.to(gl.int64)[None, :]
    if ADDED:
        rounded = (before.to(gl.float32) + gl.convert_layout(values, PLAIN)).to(residual.dtype.element_ty)
        gl.store(residual + to_row * stride_residual + col[:, None], rounded, mask=inside)
        total = rounded.to(gl.float32)
        gl.store(squares + row * ((COLS + TILE - 1) // TILE) + tile, gl.sum(total * total, axis=0))
        stored = (total * weight[:, None]).to(out.dtype.element_ty)
    else:
        stored = gl.convert_layout(values.to(out.dtype.element_ty), PLAIN)
    gl.store(out + to_row * stride_out + col[:, None], stored, mask=inside)


@gluon.jit
def _multiply_pieces(
    out, residual, norm, squares, sums, arrivals, w_ring, x_ring, ready, free, begin, stop, share, num_rows, stride_out,
    stride_residual, COLS: gl.constexpr, STEPS: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, TOGETHER: gl.constexpr,
    ADDED: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The multiplying warps: pieces begin..stop of the line, and what becomes of each column block."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    if PDL:
        gdc_wait()
    for tile in range(begin // STEPS, (stop + STEPS - 1) // STEPS):
        total = gl.zeros([TILE, ROWS], gl.float32, layout)
        before, weight = total, total
        if ADDED:
            before, weight = _neighbours(residual, norm, tile, num_rows, stride_residual, COLS, ROWS)
        start = tile * STEPS
        for piece in range(gl.maximum(begin, start), gl.minimum(stop, start + STEPS)):
            i = piece - begin
            stage = i % STAGES
            mbarrier.wait(ready.index(stage), (i // STAGES) & 1)
            started = warpgroup_mma(w_ring.index(stage), x_ring.index(stage).permute((1, 0)), total, is_async=True)
            total = warpgroup_mma_wait(0, deps=[started])
            mbarrier.arrive(free.index(stage))
        first_part = start // share
        parts = (start + STEPS - 1) // share - first_part + 1
        if parts == 1:
            _store_columns(
                out, total, residual, squares, before, weight, tile, num_rows, stride_out, stride_residual, COLS, ROWS, ADDED
            )
        else:
            at, real = _part(sums, gl.program_id(0) * 2 + (start > begin).to(gl.int32), num_rows, ROWS, layout)
            gl.store(at, total, mask=real)
            gl.thread_barrier()  # all of this program's stores come before its arrival
            arrived = gl.atomic_add(arrivals + first_part, 1, sem="acq_rel")
            if arrived == parts - 1:
                starts_inside = (start > first_part * share).to(gl.int32)
                total = _add_parts(sums, first_part, parts, starts_inside, num_rows, ROWS, TOGETHER, layout)
                _store_columns(
                    out, total, residual, squares, before, weight, tile, num_rows, stride_out, stride_residual, COLS, ROWS, ADDED
                )
                gl.store(arrivals + first_part, 0)


@gluon.jit(do_not_specialize=["num_rows", "share"])
def hopper_product_kernel(
    weights, rows, out, residual, norm, squares, sums, arrivals, num_rows, stride_out, stride_residual, share,
    COLS: gl.constexpr, DEPTH: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, TOGETHER: gl.constexpr,
    ADDED: gl.constexpr, PDL: gl.constexpr = False,
):  # fmt: skip
    """Program p takes pieces p * share.. of the line. weights, rows: descriptors in tiles [64, 64] and [ROWS, 64]; past their
    ends there is zero. sums: two slots a program; arrivals: one a program, left at zero. ADDED: see `_store_columns`, else
    residual, norm and squares are not touched. Launched with four warps."""
    if PDL:
        gdc_launch_dependents()
    steps: gl.constexpr = (DEPTH + TILE - 1) // TILE
    line: gl.constexpr = (COLS + TILE - 1) // TILE * steps
    begin = gl.program_id(0) * share
    stop = gl.minimum(begin + share, line)
    dtype: gl.constexpr = weights.dtype
    w_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, TILE], dtype)
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, TILE], dtype)
    w_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, TILE], w_layout)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, ROWS, TILE], x_layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply_pieces, (
                out, residual, norm, squares, sums, arrivals, w_ring, x_ring, ready, free, begin, stop, share, num_rows,
                stride_out, stride_residual, COLS, steps, ROWS, STAGES, TOGETHER, ADDED, PDL,
            )),
            (_copy_pieces, (weights, rows, w_ring, x_ring, ready, free, begin, stop, steps, ROWS, STAGES, PDL)),
        ],
        [1],
        [32],
    )  # fmt: skip
