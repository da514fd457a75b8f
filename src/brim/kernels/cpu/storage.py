"""Memory for packed weights: anonymous mappings on huge pages. Owns alignment and sub-allocation, not layouts."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 2 << 20
_SLAB_BYTES = 64 << 20
_ALIGNMENT_BYTES = 4096


class WeightStorage:
    """Hands out page-aligned byte tensors cut from large zeroed mappings that ask for huge pages.

    A mapping lives as long as any tensor cut from it. Memory becomes resident when first written, so the unused end of a
    mapping costs nothing but up to one huge page.
    """

    def __init__(self) -> None:
        self._slab: mmap.mmap | None = None
        self._used = 0
        self._end = 0

    def take(self, num_bytes: int) -> Tensor:
        """A zeroed uint8 tensor of num_bytes, page-aligned."""
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        if self._slab is None or self._used + num_bytes > self._end:
            self._new_slab(max(num_bytes, _SLAB_BYTES))
        assert self._slab is not None
        first = self._used
        self._used += -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return torch.frombuffer(memoryview(self._slab), dtype=torch.uint8, count=num_bytes, offset=first)

    def _new_slab(self, num_bytes: int) -> None:
        slab = mmap.mmap(-1, num_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            slab.madvise(mmap.MADV_HUGEPAGE)
        address = torch.frombuffer(memoryview(slab), dtype=torch.uint8, count=1).data_ptr()
        self._slab = slab
        self._used = -address % _HUGE_PAGE_BYTES
        self._end = self._used + num_bytes
