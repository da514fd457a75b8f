"""Rotary embedding, optional head norms and the KV write, in one pass over the new tokens."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from brim.kernels.triton.dependent import let_next_start, wait_for_earlier


@triton.jit
def _pick(q_norm, k_norm, at, inside, is_q):
    """The norm weights of q or of k at `at`, as a row."""
    q_weight = tl.load(q_norm + at, mask=inside & is_q, other=0.0)
    k_weight = tl.load(k_norm + at, mask=inside & (is_q == 0), other=0.0)
    return (q_weight + k_weight)[None, :]


@triton.jit
def _head_norm(low, high, q_norm, k_norm, is_q, half, inside, eps, HALF: tl.constexpr):
    """RMS norm over each head of [heads, D], given as its two halves in float32."""
    square = tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)
    factor = (1.0 / tl.sqrt(square / (2 * HALF) + eps))[:, None]
    w_low = _pick(q_norm, k_norm, half, inside, is_q)
    w_high = _pick(q_norm, k_norm, HALF + half, inside, is_q)
    return low * factor * w_low, high * factor * w_high


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def rope_and_cache_kernel(
    qkv, positions, cos_sin, cache, slots, q_norm, k_norm, eps, stride_qkv, stride_table,
    stride_block, stride_kv: tl.constexpr, stride_token: tl.constexpr, stride_head: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, NORMED: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (tokens, blocks of q heads then of k heads then of v heads). Heads are handled as two halves of D. Angles and places
    are the step's input, which no kernel writes: they are read before the wait."""
    let_next_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    q_blocks: tl.constexpr = (HEADS + HEADS_BLOCK - 1) // HEADS_BLOCK
    kv_blocks: tl.constexpr = (KV_HEADS + HEADS_BLOCK - 1) // HEADS_BLOCK
    is_q = part < q_blocks
    is_v = part >= q_blocks + kv_blocks
    skipped = tl.where(is_q, 0, q_blocks) + tl.where(is_v, kv_blocks, 0)
    head = (part - skipped) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    first = tl.where(is_q, 0, HEADS) + tl.where(is_v, KV_HEADS, 0)
    half = tl.arange(0, HALF_PAD)
    inside = half < HALF
    mask = (head < tl.where(is_q, HEADS, KV_HEADS))[:, None] & inside[None, :]
    turned = inside & (is_v == 0)
    angles = cos_sin + tl.load(positions + token) * stride_table + half
    cos = tl.load(angles, mask=turned, other=1.0)[None, :]
    sin = tl.load(angles + HALF, mask=turned, other=0.0)[None, :]
    wait_for_earlier(PDL)
    at = qkv + token * stride_qkv + (first + head)[:, None] * (2 * HALF) + half[None, :]
    low = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    if not is_v:
        if NORMED:
            low, high = _head_norm(low, high, q_norm, k_norm, is_q, half, inside, eps, HALF)
        low, high = low * cos - high * sin, high * cos + low * sin
    if is_q:
        tl.store(at, low.to(qkv.dtype.element_ty), mask=mask)
        tl.store(at + HALF, high.to(qkv.dtype.element_ty), mask=mask)
    else:
        slot = tl.load(slots + token)
        kept = mask & (slot >= 0)
        row = (slot // BLOCK_SIZE) * stride_block + (slot % BLOCK_SIZE) * stride_token + tl.where(is_v, stride_kv, 0)
        to = cache + row + head[:, None] * stride_head + half[None, :]
        tl.store(to, low.to(cache.dtype.element_ty), mask=kept)
        tl.store(to + HALF, high.to(cache.dtype.element_ty), mask=kept)
