"""Launches narrow products of few rows for Hopper: what they are written for, and how a product is cut. Owns `HopperProducts`.

Imported only where it is used, as `hopper_launch`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from brim.kernels.triton.hopper_product import TILE, hopper_product_kernel
from brim.kernels.triton.launch import Launch
from brim.kernels.triton.tuning import FEW_ROWS, HOPPER_PRODUCT_TILE, HopperProductTile, next_power_of_2
from brim.units import ceil_div

_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_ALIGNMENT_BYTES = 16
_MOST_COLS = 2048


@dataclass(frozen=True, slots=True)
class HopperProducts:
    """Products over one set of scratch buffers: sums for two parts a program, one arrival a program,
    squares of each row in each column block."""

    start: Launch
    num_cores: int
    sums: Tensor
    arrivals: Tensor
    squares: Tensor
    tile: HopperProductTile = HOPPER_PRODUCT_TILE

    def suits(self, x: Tensor, matrix: Tensor, out: Tensor) -> bool:
        """Whether the kernel is written for this, and better than one program a column block: few rows, narrow results, 16-bit
        values that lie at even addresses."""
        small = x.shape[0] <= FEW_ROWS and out.shape[1] <= _MOST_COLS
        right = x.dtype in _TYPES and matrix.dtype == x.dtype and out.dtype in (x.dtype, torch.float32)
        return small and right and all(map(_is_even, (x, matrix, out)))

    def adds_to(self, width: int, depths: Iterable[int]) -> bool:
        """Whether `launch_added` takes residuals of this width and x of these depths, in buffers of their own."""
        return width <= _MOST_COLS and all(size * 2 % _ALIGNMENT_BYTES == 0 for size in (width, *depths))

    def squares_of(self, width: int) -> Tensor:
        """Sums of squares [FEW_ROWS, column blocks] of what `launch_added` last left in a residual of this width. Good until
        attention, which works in the same scratch."""
        blocks = ceil_div(width, TILE.value)
        return self.squares[: FEW_ROWS * blocks].view(FEW_ROWS, blocks)

    def launch(self, x: Tensor, matrix: Tensor, out: Tensor) -> None:
        """out[T, N] = x[T, K] @ matrix[N, K].T. Only where it `suits`. x and out may have strided rows."""
        unused = self.sums  # a pointer nothing reads through
        self._start(x, matrix, out, out, unused, added=False)

    def launch_added(self, x: Tensor, matrix: Tensor, residual: Tensor, norm: Tensor, out: Tensor) -> None:
        """residual[T, N] += x[T, K] @ matrix[N, K].T, rounded; out = residual * norm[N] f32, rounded. For `squares_of`
        too. Only where it `suits`, and out and residual alike."""
        self._start(x, matrix, out, residual, norm, added=True)

    def _start(self, x: Tensor, matrix: Tensor, out: Tensor, residual: Tensor, norm: Tensor, *, added: bool) -> None:
        num_rows, (cols, depth) = x.shape[0], matrix.shape
        rows = max(8, next_power_of_2(num_rows))
        line = ceil_div(cols, TILE.value) * ceil_div(depth, TILE.value)
        share = max(self.tile.least_share, ceil_div(line, self.num_cores))
        self.start(
            hopper_product_kernel, (ceil_div(line, share),), _tiles(matrix, TILE.value), _tiles(x, rows), out, residual, norm,
            self.squares, self.sums, self.arrivals, num_rows, out.stride(0), residual.stride(0), share, COLS=cols, DEPTH=depth,
            ROWS=rows, STAGES=self.tile.stages, TOGETHER=self.tile.together, ADDED=added, num_warps=4,
            maxnreg=self.tile.registers,
        )  # fmt: skip


def _is_even(rows: Tensor) -> bool:
    """Rows that bulk copies and wide stores can reach."""
    return rows.stride(1) == 1 and rows.stride(0) * rows.element_size() % _ALIGNMENT_BYTES == 0


def _tiles(matrix: Tensor, rows: int) -> TensorDescriptor:
    """A matrix [R, K] to be copied in tiles [rows, 64]."""
    layout = gl.NVMMASharedLayout.get_default_for([rows, TILE.value], _TYPES[matrix.dtype])
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, TILE.value], layout)
