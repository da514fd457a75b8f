"""Log-softmax statistics and penalties, over whole rows of logits, without temporaries."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

PROMPT_FLAG = tl.constexpr(1 << 30)
MAX_INT = tl.constexpr(2147483647)


@triton.jit
def _next_best(logits, vocab, after, after_id, BLOCK: tl.constexpr):
    """The best (value, lowest id) that comes after (after, after_id) in the order by value, then id."""
    value = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.full([BLOCK], MAX_INT, tl.int32)
    for begin in tl.range(0, vocab, BLOCK):
        ids = begin + tl.arange(0, BLOCK)
        x = tl.load(logits + ids, mask=ids < vocab, other=float("-inf"))
        later = (ids < vocab) & ((x < after) | ((x == after) & (ids > after_id)))
        better = later & ((x > value) | (where == MAX_INT))
        value = tl.where(better, x, value)
        where = tl.where(better, ids, where)
    best = tl.max(value, axis=0)
    return best, tl.min(tl.where(value == best, where, MAX_INT), axis=0)


@triton.jit(
    do_not_specialize=["width"],
    do_not_specialize_on_alignment=["logits", "chosen", "out_chosen", "out_rank", "out_ids", "out_values"],
)
def top_logprobs_kernel(
    logits, chosen, out_chosen, out_rank, out_ids, out_values, vocab, stride_row, stride_ids, stride_values, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: the log of the sum, the chosen id's rank, then the best ids one pass each."""
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * stride_row
    picked = tl.load(base + tl.load(chosen + row))
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    above = tl.zeros([BLOCK], tl.int32)
    for begin in tl.range(0, vocab, BLOCK):
        ids = begin + tl.arange(0, BLOCK)
        x = tl.load(base + ids, mask=ids < vocab, other=float("-inf"))
        top = tl.maximum(top, x)
        above += (x > picked).to(tl.int32)
    best = tl.max(top, axis=0)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in tl.range(0, vocab, BLOCK):
        ids = begin + tl.arange(0, BLOCK)
        x = tl.load(base + ids, mask=ids < vocab, other=float("-inf"))
        total += tl.exp(x - best)
    log_total = best + tl.log(tl.sum(total, axis=0))
    tl.store(out_chosen + row, picked - log_total)
    tl.store(out_rank + row, (tl.sum(above, axis=0) + 1).to(tl.int64))
    after, after_id = tl.full([], float("inf"), tl.float32), tl.full([], -1, tl.int32)
    for place in tl.range(0, width):
        after, after_id = _next_best(base, vocab, after, after_id, BLOCK)
        tl.store(out_ids + row.to(tl.int64) * stride_ids + place, tl.minimum(after_id, vocab - 1).to(tl.int64))
        tl.store(out_values + row.to(tl.int64) * stride_values + place, after - log_total)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["ids"])
def count_ids_kernel(ids, counts, count, FROM_PROMPT: tl.constexpr, BLOCK: tl.constexpr):
    """Mark prompt ids, or count output ids, in counts[V] int32."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = index < count
    token = tl.load(ids + index, mask=real, other=0)
    if FROM_PROMPT:
        tl.atomic_or(counts + token, PROMPT_FLAG, mask=real, sem="relaxed")
    else:
        tl.atomic_add(counts + token, 1, mask=real, sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=["logits"])
def penalize_kernel(logits, counts, repetition, presence, frequency, vocab, BLOCK: tl.constexpr):
    """Apply the penalties to one row and set counts back to zero."""
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab
    seen = tl.load(counts + ids, mask=inside, other=0)
    x = tl.load(logits + ids, mask=inside & (seen != 0), other=0.0)
    x = tl.where(x > 0, x / repetition, x * repetition)
    times = seen & (PROMPT_FLAG - 1)
    x = tl.where(times > 0, x - (frequency * times.to(tl.float32) + presence), x)
    tl.store(logits + ids, x, mask=inside & (seen != 0))
    tl.store(counts + ids, seen * 0, mask=inside & (seen != 0))
