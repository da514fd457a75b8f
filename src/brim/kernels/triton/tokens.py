"""Tokens that stay on the device: the last sampled id of each row, read back as the next step's input."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from brim.kernels.triton.dependent import begin_dependent


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["ids", "rows", "last_ids"])
def resolve_ids_kernel(ids, rows, last_ids, count, BLOCK: tl.constexpr, PDL: tl.constexpr = False):
    """ids[i] = last_ids[rows[i]] where ids[i] is negative."""
    begin_dependent(PDL)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    unknown = inside & (tl.load(ids + index, mask=inside, other=0) < 0)
    row = tl.load(rows + index, mask=unknown, other=0)
    tl.store(ids + index, tl.load(last_ids + row, mask=unknown, other=0), mask=unknown)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["ids", "rows", "last_ids"])
def remember_ids_kernel(ids, rows, last_ids, count, BLOCK: tl.constexpr, PDL: tl.constexpr = False):
    """last_ids[rows[i]] = ids[i]."""
    begin_dependent(PDL)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    tl.store(last_ids + tl.load(rows + index, mask=inside, other=0), tl.load(ids + index, mask=inside), mask=inside)
