"""Triton kernels over meta tensors: every launch is listed, none is run. Owns the twin of a set of kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from triton.backends.compiler import GPUTarget

from brim.kernels.base import Kernels
from brim.kernels.rehearsal import CompileJob
from brim.kernels.triton.compile_pool import CompilePool
from brim.kernels.triton.launch import Launch
from brim.kernels.triton.variant import Variant, VariantList


class TritonRehearsal:
    """A `Rehearsal` of the kernels that `make(device, launch)` builds, compiled for `target`."""

    def __init__(
        self, target: GPUTarget, make: Callable[[torch.device, Launch], Kernels], before: Callable[[], None] | None = None
    ) -> None:
        """before: waited for in the background before Triton's cache is asked."""
        self._before = before
        self._device = torch.device("meta")
        self._listed = VariantList(target)
        self._kernels = make(self._device, self._listed)

    @property
    def kernels(self) -> Kernels:
        """See `Rehearsal`."""
        return self._kernels

    @property
    def device(self) -> torch.device:
        """See `Rehearsal`."""
        return self._device

    @property
    def num_variants(self) -> int:
        """See `Rehearsal`."""
        return len(self._listed.variants)

    @property
    def variants(self) -> frozenset[Variant]:
        """What the calls so far need."""
        return frozenset(self._listed.variants)

    def compile(self) -> CompileJob:
        """See `Rehearsal`."""
        return CompilePool(self._listed.variants, self._listed.target, before=self._before)
