"""Launches our own products of few rows: which kernel, over which grid. Owns `ProductLauncher`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from brim.kernels.base import Activation
from brim.kernels.triton.launch import Launch
from brim.kernels.triton.skinny import GELU, SILU, skinny_product_kernel, vector_product_kernel
from brim.kernels.triton.tuning import ProductTile, next_power_of_2
from brim.units import ceil_div

_LINE_ELEMENTS = 64
_FORMS = {None: 0, "silu": SILU.value, "gelu_tanh": GELU.value}


@dataclass(frozen=True, slots=True)
class ProductLauncher:
    """Products of `skinny`, each one launch; nothing is held."""

    start: Launch

    def launch(
        self,
        x: Tensor,
        matrix: Tensor,
        out: Tensor,
        tile: ProductTile,
        *,
        norm: Tensor | None = None,
        eps: float = 0.0,
        activation: Activation | None = None,
        added: bool = False,
        squares: Tensor | None = None,
    ) -> None:
        """out[T, N] = x[T, K] @ matrix[N, K].T, with an activation, matrix is [2N, K], gates first, and
        out = act(gate) * up. x and out may have strided rows. One row: x normed by `norm` [K] f32 where given; added: out +=.
        Several: each row divided by its root mean square where squares, the parts of the sum [T or more, parts], are given."""
        rows, (cols, depth) = x.shape[0], (out.shape[1], matrix.shape[1])
        forms = {
            "COLS": cols, "DEPTH": depth, "COLS_BLOCK": tile.cols, "DEPTH_BLOCK": tile.depth, "GATED": _FORMS[activation],
            "AHEAD": tile.ahead, "AHEAD_LINES": next_power_of_2(ceil_div(tile.ahead, _LINE_ELEMENTS)), "STAGES": tile.stages,
            "num_warps": tile.warps,
        }  # fmt: skip
        blocks = ceil_div(cols, tile.cols)
        unused = matrix  # a pointer nothing reads through
        if tile.rows == 1:
            assert rows == 1, "a tile for one row"
            self.start(
                vector_product_kernel, (blocks,), x, unused if norm is None else norm, matrix, out, eps, matrix.stride(0),
                NORMED=norm is not None, ADDED=added, **forms,
            )  # fmt: skip
            return
        assert norm is None and not added, "more is folded in for one row only"
        parts = 0 if squares is None else squares.shape[1]
        self.start(
            skinny_product_kernel, (blocks, ceil_div(rows, tile.rows)), x, matrix, out,
            unused if squares is None else squares, eps, rows, x.stride(0), matrix.stride(0), out.stride(0),
            ROWS_BLOCK=tile.rows, SQUARES=parts, SQUARES_PAD=next_power_of_2(parts), **forms,
        )  # fmt: skip
