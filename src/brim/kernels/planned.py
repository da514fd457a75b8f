"""What a plan needs to know of kernels, without making them. Owns `KernelFacts` and the facts of each backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from brim.errors import ConfigError
from brim.formats.ggml_type import GGMLType
from brim.kernels.base import StoredRows
from brim.kernels.cpu.quantized import BLOCK_TYPES, stored_num_bytes
from brim.kernels.cpu.weight import packed_num_bytes
from brim.kernels.torch_ref import TorchKernels
from brim.kernels.triton.scratch import KernelLimits, matrix_num_bytes


class KernelFacts(Protocol):
    """The part of the `Kernels` contract that plans are made from."""

    @property
    def name(self) -> str: ...
    @property
    def can_record(self) -> bool: ...
    @property
    def can_capture(self) -> bool: ...
    @property
    def block_types(self) -> frozenset[GGMLType]: ...
    def linear_num_bytes(self, out_features: int, in_features: int, dtype: torch.dtype) -> int: ...
    def stored_num_bytes(self, parts: Sequence[StoredRows], in_features: int, dtype: torch.dtype) -> int: ...


@dataclass(frozen=True, slots=True)
class PlannedKernels:
    """A backend that is not there. buffers: bytes of each buffer it would allocate, in order. Where there are no block_types
    a matrix is whole, so parts_bytes is not needed."""

    name: str
    can_record: bool
    can_capture: bool
    matrix_bytes: Callable[[int, int, torch.dtype], int]
    buffers: tuple[int, ...] = ()
    block_types: frozenset[GGMLType] = frozenset()
    parts_bytes: Callable[[Sequence[StoredRows], int, torch.dtype], int] | None = None

    def stored_num_bytes(self, parts: Sequence[StoredRows], in_features: int, dtype: torch.dtype) -> int:
        """See `Kernels`."""
        if self.parts_bytes is not None:
            return self.parts_bytes(parts, in_features, dtype)
        return self.matrix_bytes(sum(part.num_rows for part in parts), in_features, dtype)

    def linear_num_bytes(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """See `Kernels`."""
        return self.matrix_bytes(out_features, in_features, dtype)


def planned_kernels(backend: str, limits: KernelLimits, num_cores: int) -> PlannedKernels:
    """The facts of "native" (compiled for a CPU), "triton" or "torch" kernels. Raises ConfigError for others."""
    if backend == "native":
        return PlannedKernels("cpu", True, False, packed_num_bytes, (), BLOCK_TYPES, stored_num_bytes)
    if backend == "triton":
        shapes = limits.buffer_shapes(num_cores).values()
        buffers = tuple(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)
        return PlannedKernels("triton", False, True, matrix_num_bytes, buffers)
    if backend == "torch":
        reference = TorchKernels(torch.device("meta"))
        return PlannedKernels(reference.name, reference.can_record, reference.can_capture, reference.linear_num_bytes)
    raise ConfigError(f"A plan knows no '{backend}' kernels; the profile's must be native, triton or torch.")
