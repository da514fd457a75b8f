"""Prefill attention for Hopper: bulk copies of cache blocks, asynchronous products, groups of warps with roles of their own.

One warp copies keys and values, block by block through the block table, into rings in shared memory; two groups of four warps
each attend 64 (query, head of the group) rows to every tile. Within a group the scores of the next tile and the sum over the
present one run while the softmax is computed. Tiles come last first, so that only the first one or two need a mask.

Written in Gluon, which says what plain Triton leaves to its compiler; the tests run it on a model of the chip. Heads of 128,
groups whose size is a power of two, 16-bit values, no window and no soft cap; everything else is `prefill_attention`'s.
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

PANEL = gl.constexpr(64)  # columns of a head that lie together in shared memory: 128 bytes, the widest swizzle
GROUP_ROWS = gl.constexpr(64)  # rows of one group of warps: what one matrix instruction takes
HEAD_DIM = gl.constexpr(128)


@gluon.jit
def _load_tile(
    source, ring, ready, free, step, num_tiles, table, last_block, block_rows, column,
    KEYS: gl.constexpr, STAGES: gl.constexpr, BLOCK_SIZE: gl.constexpr,
):  # fmt: skip
    """Keys or values of a step into their stage, once both groups gave it up. Past the last block that one is read again."""
    blocks: gl.constexpr = KEYS // BLOCK_SIZE
    small: gl.constexpr = [blocks, BLOCK_SIZE, PANEL]
    first = (num_tiles - 1 - step) * blocks
    rows = ()
    for j in gl.static_range(blocks):  # all before the wait: a load between two copies would wait for each
        rows += (gl.load(table + gl.minimum(first + j, last_block)) * block_rows,)
    stage = step % STAGES
    mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(ready.index(stage), KEYS * HEAD_DIM * 2)
    for j in gl.static_range(blocks):
        for panel in gl.static_range(HEAD_DIM // PANEL):
            to = ring.index(stage * 2 + panel)._reinterpret(source.dtype, small, source.layout).index(j)
            tma.async_copy_global_to_shared(source, [rows[j], column + panel * PANEL], ready.index(stage), to)


@gluon.jit
def _load_tiles(
    keys, values, k_ring, v_ring, k_ready, k_free, v_ready, v_free, num_tiles, table, last_block, block_rows, column,
    KEYS: gl.constexpr, STAGES: gl.constexpr, BLOCK_SIZE: gl.constexpr,
):  # fmt: skip
    """The copying warp. Keys go a step ahead of values: a stage of keys is free half a step before the stage of values that
    came with it, and keys are needed first."""
    _load_tile(
        keys, k_ring, k_ready, k_free, 0, num_tiles, table, last_block, block_rows, column, KEYS, STAGES, BLOCK_SIZE
    )  # fmt: skip
    for i in range(1, num_tiles):
        _load_tile(
            keys, k_ring, k_ready, k_free, i, num_tiles, table, last_block, block_rows, column, KEYS, STAGES, BLOCK_SIZE
        )  # fmt: skip
        _load_tile(
            values, v_ring, v_ready, v_free, i - 1, num_tiles, table, last_block, block_rows, column, KEYS, STAGES, BLOCK_SIZE
        )  # fmt: skip
    _load_tile(
        values, v_ring, v_ready, v_free, num_tiles - 1, num_tiles, table, last_block, block_rows, column, KEYS, STAGES, BLOCK_SIZE
    )  # fmt: skip


@gluon.jit
def _clear_tail(v_ring, stage, rows_left, KEYS: gl.constexpr):
    """Zero the rows of a tile of values from rows_left on: they may hold anything, and zero times anything must be zero."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, KEYS, gl.SliceLayout(1, layout))
    for panel in gl.static_range(HEAD_DIM // PANEL):
        tile = v_ring.index(stage * 2 + panel)
        values = tile.load(layout)
        tile.store(gl.where((row < rows_left)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()


@gluon.jit
def _start_scores(q_ring, part, k_ring, stage, S_LAYOUT: gl.constexpr, KEYS: gl.constexpr):
    """Queries times keys of a stage, under way."""
    none = gl.zeros([GROUP_ROWS, KEYS], gl.float32, S_LAYOUT)
    scores = warpgroup_mma(q_ring.index(part * 2), k_ring.index(stage * 2).permute((1, 0)), none, use_acc=False, is_async=True)
    return warpgroup_mma(q_ring.index(part * 2 + 1), k_ring.index(stage * 2 + 1).permute((1, 0)), scores, is_async=True)


@gluon.jit
def _softmax(scores, top, total, outer, tile, query_pos, KEYS: gl.constexpr, MASKED: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Weights of a tile, by what earlier sums shrink, the new maximum and total."""
    if MASKED:
        place = tile * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, S_LAYOUT))
        scores = gl.where(place[None, :] <= query_pos[:, None], scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, axis=1) * outer)
    base = new_top
    if MASKED:  # a row that has seen nothing yet
        base = gl.where(new_top == float("-inf"), 0.0, new_top)
    weights = gl.exp2(scores * outer - base[:, None])
    shrink = gl.exp2(top - base)
    return weights, shrink, new_top, total * shrink + gl.sum(weights, axis=1)


@gluon.jit
def _attend(
    low, high, weights, top, total, q_ring, part, k_ring, v_ring, k_ready, k_free, v_ready, v_free, begin, end, num_tiles, outer,
    query_pos, KEYS: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Steps begin..end: add the tile of each step, whose weights are there, and find the weights of the next one, whose keys
    are there."""
    for i in range(begin, end):
        stage = i % STAGES
        next_stage = (i + 1) % STAGES
        scores = _start_scores(q_ring, part, k_ring, next_stage, S_LAYOUT, KEYS)
        mbarrier.wait(v_ready.index(stage), (i // STAGES) & 1)
        low_sum = warpgroup_mma(weights, v_ring.index(stage * 2), low, is_async=True)
        high_sum = warpgroup_mma(weights, v_ring.index(stage * 2 + 1), high, is_async=True)
        scores = warpgroup_mma_wait(2, deps=[scores])
        mbarrier.arrive(k_free.index(next_stage))
        tile = num_tiles - 2 - i
        p, shrink, top, total = _softmax(scores, top, total, outer, tile, query_pos, KEYS, MASKED, S_LAYOUT)
        following = gl.convert_layout(p.to(k_ring.dtype), P_LAYOUT)
        # the keys after the next are waited for here, between softmax and sum: the assembler moves no arithmetic over a wait
        mbarrier.wait(k_ready.index((i + 2) % STAGES), ((i + 2) // STAGES) & 1, pred=i + 2 < num_tiles)
        low, high, weights, following, total = warpgroup_mma_wait(0, deps=[low_sum, high_sum, weights, following, total])
        mbarrier.arrive(v_free.index(stage))
        low = low * gl.convert_layout(shrink, gl.SliceLayout(1, low.type.layout))[:, None]
        high = high * gl.convert_layout(shrink, gl.SliceLayout(1, high.type.layout))[:, None]
        weights = following
    return low, high, weights, top, total


@gluon.jit
def _attend_rows(
    part, q, out, q_ring, k_ring, v_ring, k_ready, k_free, v_ready, v_free, token, first, length, query_len, head,
    num_tiles, plain_tiles, outer, stride_q, stride_out, GROUP: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One group of four warps: rows part*64 .. of the program's (query, head) pairs."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, PANEL, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = part * GROUP_ROWS + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, plain))
    col = gl.arange(0, PANEL, gl.SliceLayout(0, plain))
    query = first + row // GROUP
    real = (query < query_len)[:, None]
    token_row = (token + query).to(gl.int64)
    cell = ((head * GROUP + row % GROUP) * HEAD_DIM)[:, None] + col[None, :]
    for panel in gl.static_range(HEAD_DIM // PANEL):
        at = q + token_row[:, None] * stride_q + cell + panel * PANEL
        q_ring.index(part * 2 + panel).store(gl.load(at, mask=real, other=0.0))
    fence_async_shared()
    s_row = part * GROUP_ROWS + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, s_layout))
    query_pos = length - query_len + first + s_row // GROUP
    low = gl.zeros([GROUP_ROWS, PANEL], gl.float32, o_layout)
    high = gl.zeros([GROUP_ROWS, PANEL], gl.float32, o_layout)
    top = gl.full([GROUP_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    total = gl.zeros([GROUP_ROWS], gl.float32, gl.SliceLayout(1, s_layout))
    mbarrier.wait(k_ready.index(0), 0)
    scores = warpgroup_mma_wait(0, deps=[_start_scores(q_ring, part, k_ring, 0, s_layout, KEYS)])
    mbarrier.arrive(k_free.index(0))
    p, _, top, total = _softmax(scores, top, total, outer, num_tiles - 1, query_pos, KEYS, True, s_layout)
    weights = gl.convert_layout(p.to(k_ring.dtype), p_layout)
    rows_left = length - (num_tiles - 1) * KEYS
    if rows_left < KEYS:
        mbarrier.wait(v_ready.index(0), 0)
        _clear_tail(v_ring, 0, rows_left, KEYS)
    mbarrier.wait(k_ready.index(1), 0, pred=num_tiles > 1)
    masked_end = gl.maximum(num_tiles - 1 - plain_tiles, 0)
    low, high, weights, top, total = _attend(
        low, high, weights, top, total, q_ring, part, k_ring, v_ring, k_ready, k_free, v_ready, v_free, 0, masked_end,
        num_tiles, outer, query_pos, KEYS, STAGES, True, s_layout, p_layout,
    )  # fmt: skip
    low, high, weights, top, total = _attend(
        low, high, weights, top, total, q_ring, part, k_ring, v_ring, k_ready, k_free, v_ready, v_free, masked_end, num_tiles - 1,
        num_tiles, outer, query_pos, KEYS, STAGES, False, s_layout, p_layout,
    )  # fmt: skip
    last = num_tiles - 1
    mbarrier.wait(v_ready.index(last % STAGES), (last // STAGES) & 1)
    low_sum = warpgroup_mma(weights, v_ring.index((last % STAGES) * 2), low, is_async=True)
    high_sum = warpgroup_mma(weights, v_ring.index((last % STAGES) * 2 + 1), high, is_async=True)
    low, high, weights = warpgroup_mma_wait(0, deps=[low_sum, high_sum, weights])
    factor = gl.convert_layout(1.0 / total, gl.SliceLayout(1, o_layout))[:, None]
    to = out + token_row[:, None] * stride_out + cell
    gl.store(to, gl.convert_layout((low * factor).to(q.dtype.element_ty), plain), mask=real)
    gl.store(to + PANEL, gl.convert_layout((high * factor).to(q.dtype.element_ty), plain), mask=real)


@gluon.jit(
    do_not_specialize=["num_seqs", "least_queries", "stride_table", "block_rows"],
    do_not_specialize_on_alignment=["tables", "query_start", "seq_lens"],
)
def hopper_attention_kernel(
    q, keys, values, out, tables, query_start, seq_lens, outer, num_seqs, least_queries, stride_q, stride_out, stride_table,
    block_rows, SEQS_PAD: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, PDL: gl.constexpr = False,
):  # fmt: skip
    """Grid and sequences as in `prefill_attention_kernel`, 128 rows a program. keys, values: descriptors of the cache as rows of
    K * D elements, block_rows rows from a block to the next, in tiles [BLOCK_SIZE, 64]. Launched with four warps."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    queries: gl.constexpr = 2 * GROUP_ROWS // GROUP
    head = gl.program_id(0) % KV_HEADS
    block = gl.num_programs(0) // KV_HEADS - 1 - gl.program_id(0) // KV_HEADS
    index = gl.arange(0, SEQS_PAD, gl.BlockedLayout([1], [32], [4], [0]))
    starts = gl.load(query_start + index, mask=index < num_seqs, other=0)
    seq = gl.sum(((index < num_seqs) & (starts // queries + index <= block)).to(gl.int32), axis=0) - 1
    token = gl.load(query_start + seq)
    query_len = gl.load(query_start + seq + 1) - token
    first = (block - (token // queries + seq)) * queries
    if (first < query_len) & (query_len >= least_queries):
        length = gl.load(seq_lens + seq)
        first_pos = length - query_len + first
        num_tiles = (gl.minimum(first_pos + queries, length) + KEYS - 1) // KEYS
        plain_tiles = (first_pos + 1) // KEYS
        dtype: gl.constexpr = q.dtype.element_ty
        q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP_ROWS, PANEL], dtype)
        k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, PANEL], dtype)
        q_ring = gl.allocate_shared_memory(dtype, [4, GROUP_ROWS, PANEL], q_layout)
        k_ring = gl.allocate_shared_memory(dtype, [STAGES * 2, KEYS, PANEL], k_layout)
        v_ring = gl.allocate_shared_memory(dtype, [STAGES * 2, KEYS, PANEL], k_layout)
        k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(k_ready.index(stage), count=1)
            mbarrier.init(v_ready.index(stage), count=1)
            mbarrier.init(k_free.index(stage), count=2)
            mbarrier.init(v_free.index(stage), count=2)
        fence_async_shared()
        table = tables + seq.to(gl.int64) * stride_table
        last_block = (length - 1) // BLOCK_SIZE
        gl.warp_specialize(
            [
                (_attend_rows, (
                    0, q, out, q_ring, k_ring, v_ring, k_ready, k_free, v_ready, v_free, token, first, length, query_len, head,
                    num_tiles, plain_tiles, outer, stride_q, stride_out, GROUP, KEYS, STAGES,
                )),
                (_attend_rows, (
                    1, q, out, q_ring, k_ring, v_ring, k_ready, k_free, v_ready, v_free, token, first, length, query_len, head,
                    num_tiles, plain_tiles, outer, stride_q, stride_out, GROUP, KEYS, STAGES,
                )),
                (_load_tiles, (
                    keys, values, k_ring, v_ring, k_ready, k_free, v_ready, v_free, num_tiles, table, last_block, block_rows,
                    head * HEAD_DIM, KEYS, STAGES, BLOCK_SIZE,
                )),
            ],
            [4, 1],
            [232, 32],
        )  # fmt: skip
