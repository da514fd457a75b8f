"""Products of one row with their neighbours folded in, and of few rows, against the reference's separate calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from brim.kernels.base import Activation, FoldedNorm, Kernels
from brim.kernels.torch_ref import TorchKernels
from brim.kernels.triton.chip import Chip
from brim.kernels.triton.choice import KernelChoice
from brim.kernels.triton.kernels import TritonKernels
from brim.kernels.triton.launch import depending, launch_now
from brim.kernels.triton.products import ProductLauncher
from brim.kernels.triton.scratch import KernelLimits
from brim.kernels.triton.tuning import FEW_ROWS, ProductTile, product_tile

from .helpers import assert_close, rows_of

NAN = float("nan")
DTYPES = [torch.float32, torch.float16]  # the interpreter multiplies no bfloat16
HALF = torch.float16


def kernels_on(device: str) -> TritonKernels:
    return TritonKernels(device, KernelLimits(80, 4, 2, 16, 100), choice=KernelChoice(fused_row=True))


def both(device: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[tuple[Kernels, Any], tuple[Kernels, Any]]:
    """Kernels with the same weight: ours, and the reference in float32."""
    values = torch.randn(out_features, in_features).to(dtype)
    made = []
    for kernels, kept in ((kernels_on(device), dtype), (TorchKernels(device), torch.float32)):
        weight = kernels.new_linear(out_features, in_features, kept)
        weight.load_rows(0, values)
        made.append((kernels, weight))
    return made[0], made[1]


def expected_norm(x: Tensor, norm: Tensor) -> Tensor:
    """Normed and rounded to x's type, then float32."""
    out = torch.empty_like(x)
    TorchKernels(x.device).rms_norm(x, norm, 1e-6, out)
    return out.float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), [(37, 72), (64, 144), (20, 5000)])
def test_norm_and_product(device: str, out_features: int, in_features: int, dtype: torch.dtype) -> None:
    (ours, weight), (reference, plain) = both(device, out_features, in_features, dtype)
    x, norm = rows_of(1, in_features, dtype, device, pad=8), torch.rand(in_features, device=device) + 0.5
    out = rows_of(1, out_features, dtype, device, pad=4, fill=NAN)
    expected = torch.empty(1, out_features, device=device)
    ours.norm_linear(FoldedNorm(x, norm, 1e-6, x), weight, out)
    reference.linear(expected_norm(x, norm), plain, expected)
    assert_close(out, expected, 1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # infinity is what is meant
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_norm_product_and_activation(device: str, activation: Activation) -> None:
    (ours, weight), (reference, plain) = both(device, 2 * 40, 72, HALF)
    x, norm = rows_of(1, 72, HALF, device), torch.rand(72, device=device) + 0.5
    out = rows_of(1, 40, HALF, device, pad=40, fill=NAN)
    gate_up, expected = torch.empty(1, 80, device=device), torch.empty(1, 40, device=device)
    ours.norm_gated_linear(FoldedNorm(x, norm, 1e-6, x), weight, activation, out)
    reference.linear(expected_norm(x, norm), plain, gate_up)
    reference.gated_activation(gate_up, expected, activation)
    assert_close(out, expected, 2e-3)


def test_sum_with_the_residual(device: str) -> None:
    (ours, weight), (reference, plain) = both(device, 24, 80, HALF)
    x, residual = rows_of(1, 80, HALF, device, pad=16), rows_of(1, 24, HALF, device)
    product = torch.empty(1, 24, device=device)
    reference.linear(x.float(), plain, product)
    expected = residual.float() + product
    ours.add_linear(x, weight, FoldedNorm(residual, residual, 0.0, residual))
    assert_close(residual, expected, 2e-3)


def test_logits_of_one_row(device: str) -> None:
    (ours, weight), (reference, plain) = both(device, 50, 40, HALF)
    x = rows_of(1, 40, HALF, device)
    out, expected = torch.full((1, 50), NAN, device=device), torch.empty(1, 50, device=device)
    ours.linear(x, weight, out)
    reference.linear(x.float(), plain, expected)
    assert_close(out, expected, 1e-4)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # infinity is what is meant
@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "cols", "depth"), [(2, 50, 40), (6, 64, 512), (16, 37, 700), (17, 32, 1024)])
def test_few_rows(device: str, rows: int, cols: int, depth: int, activation: Activation | None) -> None:
    (_, weight), (reference, plain) = both(device, cols * (2 if activation else 1), depth, HALF)
    x, out = rows_of(rows, depth, HALF, device, pad=8), rows_of(rows, cols, HALF, device, pad=cols, fill=NAN)
    product = torch.empty(rows, weight.storage.shape[0], device=device)
    reference.linear(x.float(), plain, product)
    expected = product
    if activation:
        expected = torch.empty(rows, cols, device=device)
        reference.gated_activation(product, expected, activation)
    tile = product_tile(rows, cols, depth, gated=activation is not None)
    ProductLauncher(launch_now).launch(x, weight.storage, out, tile, activation=activation)
    assert_close(out, expected, 4e-3)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # infinity is what is meant
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("rows", "depth"), [(2, 64), (7, 328), (16, 1024)])
def test_few_rows_divided_by_their_root_mean_square(device: str, rows: int, depth: int, activation: Activation | None) -> None:
    """The second half of a norm: x is weighed by the first, which left parts of its sums of squares too."""
    (_, weight), (reference, plain) = both(device, 48 * (2 if activation else 1), depth, HALF)
    x, norm = rows_of(rows, depth, HALF, device, pad=8), torch.rand(depth, device=device) + 0.5
    squares = torch.full((rows, -(-depth // 64)), NAN, device=device)
    for part in range(squares.shape[1]):
        squares[:, part] = x[:, part * 64 : part * 64 + 64].float().pow(2).sum(1)
    out, product = rows_of(rows, 48, HALF, device, fill=NAN), torch.empty(rows, weight.storage.shape[0], device=device)
    reference.linear(expected_norm(x, norm), plain, product)
    expected = product
    if activation:
        expected = torch.empty(rows, 48, device=device)
        reference.gated_activation(product, expected, activation)
    tile, weighed = product_tile(rows, 48, depth, gated=activation is not None), (x * norm).to(HALF)
    ProductLauncher(launch_now).launch(weighed, weight.storage, out, tile, squares=squares, eps=1e-6, activation=activation)
    assert_close(out, expected, 4e-3)


def test_a_row_is_the_same_among_others(device: str) -> None:
    x, matrix = rows_of(15, 64, HALF, device), torch.randn(48, 64, device=device).to(HALF)
    together, alone = (rows_of(n, 48, HALF, device, fill=NAN) for n in (15, 2))
    for rows, out in ((x, together), (x[3:5], alone)):
        ProductLauncher(launch_now).launch(rows, matrix, out, product_tile(len(rows), 48, 64, gated=False))
    assert torch.equal(alone, together[3:5])


@pytest.mark.parametrize(("cols", "depth"), [(16, 16), (32, 64), (64, 128)])
def test_tiles_give_the_same_product(device: str, cols: int, depth: int) -> None:
    x, matrix = rows_of(7, 200, torch.float32, device), torch.randn(50, 200, device=device)
    out = rows_of(7, 50, torch.float32, device, fill=NAN)
    ProductLauncher(launch_now).launch(x, matrix, out, ProductTile(16, cols, depth, 4, 2, 0))
    assert_close(out, x @ matrix.T, 1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_a_tile_for_every_number_of_rows(gated: bool) -> None:
    assert product_tile(1, 4096, 1024, gated=gated).rows == 1
    assert all(product_tile(rows, 4096, 1024, gated=gated).rows >= rows for rows in range(2, FEW_ROWS + 1))


def test_which_product_is_taken() -> None:
    """On the chip that they are written for, by rows and columns; the library's makes no launch of ours."""
    names: list[str] = []

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__)

    kernels = TritonKernels("meta", KernelLimits(80, 4, 2, 16, 100), Chip(132, True, True, hopper=True), launch)
    narrow, wide = (kernels.new_linear(cols, 1024, torch.bfloat16) for cols in (1024, 6144))
    taken = {}
    for rows in (1, 2, FEW_ROWS, FEW_ROWS + 1):
        x, out = (torch.empty(rows, cols, dtype=torch.bfloat16, device="meta") for cols in (1024, 6144))
        kernels.linear(x, narrow, out[:, :1024])
        kernels.linear(x, wide, out)
        kernels.gated_linear(x, wide, out, out[:, :3072], "silu")
        taken[rows] = [name.removesuffix("_kernel") for name in names]
        names.clear()
    few = ["hopper_product", "skinny_product", "skinny_product"]
    assert taken == {1: ["vector_product"] * 3, 2: few, FEW_ROWS: few, FEW_ROWS + 1: ["gated_activation"]}


def test_kernels_that_depend_on_the_one_before_are_told_so() -> None:
    launches: list[dict[str, Any]] = []

    class Kernel:
        def __init__(self, names: list[str]) -> None:
            self.arg_names = names

    start = depending(lambda kernel, grid, *arguments, **options: launches.append(options))
    start(Kernel(["x", "PDL"]), (1,), 1, num_warps=4)
    start(Kernel(["x"]), (1,), 1, num_warps=4)
    assert launches == [{"num_warps": 4, "PDL": True, "launch_pdl": True}, {"num_warps": 4}]
