"""Flash attention over the paged cache for sequences of any number of new tokens.

Rows of a tile are (query, head of the group) pairs, so grouped heads share each key they read. A program finds its sequence
on the device: sequence s owns row blocks from query_start[s] // Q + s on (Q queries a block), which is monotone and leaves
room for each sequence's last, partial block. The grid follows from T and S alone.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from brim.kernels.triton.dependent import begin_dependent
from brim.kernels.triton.tiles import attend_tiles


@triton.jit(
    do_not_specialize=["num_seqs", "least_queries", "stride_table"],
    do_not_specialize_on_alignment=["tables", "query_start", "seq_lens"],
)
def prefill_attention_kernel(
    q, cache, out, tables, query_start, seq_lens, inner, outer, num_seqs, least_queries, stride_q, stride_out,
    stride_table, stride_block, stride_kv: tl.constexpr, stride_token: tl.constexpr, stride_head: tl.constexpr,
    SEQS_PAD: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (row blocks * KV_HEADS), the last queries (whose contexts are longest) first. Sequences with fewer than
    least_queries new tokens are left to decode attention."""
    begin_dependent(PDL)
    head = tl.program_id(0) % KV_HEADS
    block = tl.num_programs(0) // KV_HEADS - 1 - tl.program_id(0) // KV_HEADS
    queries: tl.constexpr = ROWS // GROUP
    index = tl.arange(0, SEQS_PAD)
    starts = tl.load(query_start + index, mask=index < num_seqs, other=0)
    owned = (index < num_seqs) & (starts // queries + index <= block)
    seq = tl.sum(owned.to(tl.int32), axis=0) - 1
    token = tl.load(query_start + seq)
    query_len = tl.load(query_start + seq + 1) - token
    first = (block - (token // queries + seq)) * queries
    if (first < query_len) & (query_len >= least_queries):
        length = tl.load(seq_lens + seq)
        row = tl.arange(0, ROWS)
        col = tl.arange(0, D_PAD)
        query = first + row // GROUP
        inside = ((row < queries * GROUP) & (query < query_len))[:, None] & (col < D)[None, :]
        cell = (head * GROUP + row % GROUP)[:, None] * D + col[None, :]
        token_row = (token + query).to(tl.int64)
        group = tl.load(q + token_row[:, None] * stride_q + cell, mask=inside, other=0.0)
        query_pos = length - query_len + query
        first_pos = length - query_len + first
        last_pos = tl.minimum(first_pos + queries, length) - 1
        lowest = first_pos * 0
        if WINDOW:
            lowest = tl.maximum(first_pos - WINDOW + 1, 0)
        table = tables + seq.to(tl.int64) * stride_table
        source = cache + head * stride_head
        acc = tl.zeros([ROWS, D_PAD], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        begin, end = lowest // KEYS, (last_pos + KEYS) // KEYS
        plain_end = tl.minimum(tl.maximum((first_pos + 1) // KEYS, begin), end)  # tiles before it lie before every query
        plain = begin
        if WINDOW:  # tiles from here on lie inside the window of every query
            plain = tl.minimum(tl.maximum((tl.maximum(last_pos - WINDOW + 1, 0) + KEYS - 1) // KEYS, begin), plain_end)
            acc, top, total = attend_tiles(
                acc, top, total, group, source, table, query_pos, begin, plain, inner, outer, stride_block, stride_kv,
                stride_token, D, D_PAD, KEYS, BLOCK_SIZE, WINDOW, SOFTCAP, True, last_pos, lowest,
            )  # fmt: skip
        acc, top, total = attend_tiles(
            acc, top, total, group, source, table, query_pos, plain, plain_end, inner, outer, stride_block, stride_kv,
            stride_token, D, D_PAD, KEYS, BLOCK_SIZE, WINDOW, SOFTCAP, False, last_pos, lowest,
        )  # fmt: skip
        acc, top, total = attend_tiles(
            acc, top, total, group, source, table, query_pos, plain_end, end, inner, outer, stride_block, stride_kv,
            stride_token, D, D_PAD, KEYS, BLOCK_SIZE, WINDOW, SOFTCAP, True, last_pos, lowest,
        )  # fmt: skip
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + token_row[:, None] * stride_out + cell, acc.to(out.dtype.element_ty), mask=inside)
