"""Weights kept as the file quantised them. Owns which block types the native kernels multiply, and a matrix made of such parts.

The layout (the same bytes in another order, 64 rows side by side) is said in csrc/blocks.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from brim.formats.ggml_type import GGMLType
from brim.kernels.base import LinearWeight, StoredRows
from brim.kernels.cpu.weight import packed_num_bytes

BLOCK_TYPES = frozenset(
    (
        GGMLType.Q4_0,
        GGMLType.Q4_1,
        GGMLType.Q5_0,
        GGMLType.Q5_1,
        GGMLType.Q8_0,
        GGMLType.Q4_K,
        GGMLType.Q5_K,
        GGMLType.Q6_K,
    )
)


class BlockKernels(Protocol):
    """What fills and reads a weight: the native kernels."""

    def pack_blocks(self, weight: BlockWeight, first_row: int, blocks: Tensor) -> None: ...

    def embed(self, ids: Tensor, weight: LinearWeight, scale: float, out: Tensor) -> None: ...


def block_row_bytes(in_features: int, block_type: GGMLType) -> int:
    """Bytes of one row as stored. Example: 640 elements of Q5_0 are 20 blocks of 22 bytes: 440."""
    return in_features // block_type.block_elements * block_type.block_bytes


def block_num_bytes(out_features: int, in_features: int, block_type: GGMLType) -> int:
    """Bytes of a matrix of blocks, rows rounded up to 16. Example: 100 x 640 of Q5_0 is 112 x 440 = 49,280."""
    return -(-out_features // 16) * 16 * block_row_bytes(in_features, block_type)


def merged(parts: Sequence[StoredRows]) -> list[StoredRows]:
    """Neighbours that are kept alike as one."""
    return [StoredRows(sum(part.num_rows for part in same), kind) for kind, same in groupby(parts, lambda p: p.block_type)]


def stored_num_bytes(parts: Sequence[StoredRows], in_features: int, dtype: torch.dtype) -> int:
    """Bytes of a matrix of such parts."""
    return sum(
        packed_num_bytes(part.num_rows, in_features, dtype)
        if part.block_type is None
        else block_num_bytes(part.num_rows, in_features, part.block_type)
        for part in merged(parts)
    )


class BlockWeight(LinearWeight):
    """A matrix of one block type. `dtype` is that of the rows it is multiplied with."""

    def __init__(
        self,
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        block_type: GGMLType,
        storage: Tensor,
        kernels: BlockKernels,
    ) -> None:
        assert storage.numel() == block_num_bytes(out_features, in_features, block_type)
        self.out_features = out_features
        self.in_features = in_features
        self.dtype = dtype
        self.block_type = block_type
        self.storage = storage  # uint8
        self.data_ptr = storage.data_ptr()
        self._kernels = kernels

    @property
    def num_bytes(self) -> int:
        return self.storage.numel()

    def block_type_of(self, row: int) -> GGMLType | None:
        return self.block_type

    def load_rows(self, first_row: int, rows: Tensor) -> None:
        raise AssertionError("a matrix of blocks takes blocks")

    def load_blocks(self, first_row: int, blocks: Tensor) -> None:
        assert blocks.shape[1] == block_row_bytes(self.in_features, self.block_type) and blocks.stride(1) == 1
        assert first_row >= 0 and first_row + blocks.shape[0] <= self.out_features
        self._kernels.pack_blocks(self, first_row, blocks)

    def to_dense(self) -> Tensor:
        """In float32, as dequantising the blocks gives it."""
        out = torch.empty(self.out_features, self.in_features)
        self._kernels.embed(torch.arange(self.out_features), self, 1.0, out)
        return out


class JoinedWeight(LinearWeight):
    """A matrix whose rows are stored in several ways: each part a weight of its own, one below the other."""

    def __init__(self, parts: Sequence[LinearWeight]) -> None:
        first = parts[0]
        assert all(part.in_features == first.in_features and part.dtype == first.dtype for part in parts)
        self.parts = tuple(parts)
        self.out_features = sum(part.out_features for part in parts)
        self.in_features = first.in_features
        self.dtype = first.dtype

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def block_type_of(self, row: int) -> GGMLType | None:
        part, within = self._part_at(row)
        return part.block_type_of(within)

    def load_rows(self, first_row: int, rows: Tensor) -> None:
        part, within = self._part_at(first_row)
        part.load_rows(within, rows)

    def load_blocks(self, first_row: int, blocks: Tensor) -> None:
        part, within = self._part_at(first_row)
        part.load_blocks(within, blocks)

    def to_dense(self) -> Tensor:
        return torch.cat([part.to_dense().float() for part in self.parts])

    def _part_at(self, row: int) -> tuple[LinearWeight, int]:
        """The part that holds a row, and the row's number in it. What is loaded at once lies in one part."""
        for part in self.parts:
            if row < part.out_features:
                return part, row
            row -= part.out_features
        raise AssertionError("no such row")
