"""Packed linear weights. Owns the layout's arithmetic; csrc/tile.h says the same to the kernels.

Panels of 64 output features, the last as narrow as a multiple of 16 allows, each [in_features][width] for float32 and float16,
[in_features / 2][width][2] for bfloat16 (in_features rounded up to even).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from brim.kernels.base import LinearWeight

_PANEL = 64


class RowPacker(Protocol):
    """What fills a weight: the native kernels."""

    def pack_rows(self, weight: PackedWeight, first_row: int, rows: Tensor) -> None: ...


def packed_depth(in_features: int, dtype: torch.dtype) -> int:
    """in_features as stored."""
    return in_features + in_features % 2 if dtype == torch.bfloat16 else in_features


def packed_num_bytes(out_features: int, in_features: int, dtype: torch.dtype) -> int:
    """Bytes of a packed matrix. Example: 100 x 64 bfloat16 is 112 x 64 x 2 = 14336."""
    return -(-out_features // 16) * 16 * packed_depth(in_features, dtype) * dtype.itemsize


class PackedWeight(LinearWeight):
    """A weight matrix in the packed layout."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype, storage: Tensor, packer: RowPacker) -> None:
        assert storage.numel() == packed_num_bytes(out_features, in_features, dtype)
        self.out_features = out_features
        self.in_features = in_features
        self.dtype = dtype
        self.storage = storage  # uint8
        self.data_ptr = storage.data_ptr()
        self._packer = packer

    @property
    def num_bytes(self) -> int:
        return self.storage.numel()

    def load_rows(self, first_row: int, rows: Tensor) -> None:
        assert rows.ndim == 2 and rows.shape[1] == self.in_features
        assert first_row >= 0 and first_row + rows.shape[0] <= self.out_features
        self._packer.pack_rows(self, first_row, rows)

    def to_dense(self) -> Tensor:
        depth, padded = packed_depth(self.in_features, self.dtype), -(-self.out_features // 16) * 16
        step = 2 if self.dtype == torch.bfloat16 else 1
        values = self.storage.view(self.dtype)
        whole = padded // _PANEL * _PANEL
        parts = []
        for first, panels, width in ((0, whole // _PANEL, _PANEL), (whole, 1, padded - whole)):
            if panels and width:
                part = values[first * depth : (first + panels * width) * depth].view(panels, depth // step, width, step)
                parts.append(part.permute(0, 2, 1, 3).reshape(panels * width, depth))
        return torch.cat(parts)[: self.out_features, : self.in_features].clone()
