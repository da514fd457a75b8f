"""What kernels do so that the next one starts before they end (programmatic dependent launch). Owns the few device functions.

A kernel launched with `launch_pdl` may begin while the kernel before it still runs: it asks for the weights it will read, then
waits, and only then touches what others wrote or read. Every program of every such kernel waits, so the end of a kernel means the
end of all before it. A step's inputs (lengths, places, block tables) are read before the wait too: they are there before the
step's embedding starts, which is launched in order. PDL is False in Triton's interpreter and where there are no such launches.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LINE_ELEMENTS = tl.constexpr(64)  # 16-bit values in a cache line of 128 bytes


@triton.jit
def begin_dependent(PDL: tl.constexpr):
    """The first line of a kernel that reads nothing ahead: the next may be scheduled, what came before has ended."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def wait_for_earlier(PDL: tl.constexpr):
    """All kernels before this one have ended and their writes are seen."""
    if PDL:
        gdc_wait()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """The next kernel may be scheduled as soon as there is room beside this one."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def prefetch_rows(matrix, rows, stride_row, WIDTH: tl.constexpr, LINES: tl.constexpr):
    """Ask for the first WIDTH 16-bit values of each of `rows` in the second-level cache; nothing waits. LINES: a power of two."""
    line = tl.arange(0, LINES) * LINE_ELEMENTS
    at = matrix + rows.to(tl.int64)[:, None] * stride_row + tl.minimum(line, WIDTH - 1)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )
