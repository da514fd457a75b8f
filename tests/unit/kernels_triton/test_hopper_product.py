"""Products of few rows for Hopper, on a model of the chip: right results in any order of what runs at once, and the model finds
faults that are put in. On the chip itself: tests/device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.unit.kernels_triton.gluon_model import GluonFault, Machine
from tests.unit.kernels_triton.helpers import assert_close, rows_of
from torch import Tensor

from brim.kernels.triton import hopper_product
from brim.kernels.triton.hopper_products import HopperProducts
from brim.kernels.triton.launch import launch_now
from brim.kernels.triton.tuning import FEW_ROWS, HopperProductTile

SOURCE = Path(hopper_product.__file__)
TILE = HopperProductTile(stages=3, least_share=1, together=4, registers=72)
NAN = float("nan")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def products_of(machine: Machine, num_cores: int, tile: HopperProductTile = TILE) -> HopperProducts:
    sums, squares = torch.full((num_cores * 2 * 64 * FEW_ROWS,), NAN), torch.full((FEW_ROWS * 32,), NAN)
    return HopperProducts(machine.launch, num_cores, sums, torch.zeros(num_cores, dtype=torch.int32), squares, tile)


def multiply(
    machine: Machine,
    size: tuple[int, int, int],
    num_cores: int = 4,
    tile: HopperProductTile = TILE,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """What the kernel left where there was NaN, and what is right. size: rows, columns, depth."""
    rows, cols, depth = size
    x = rows_of(rows, depth, torch.bfloat16, "cpu", pad=16)
    matrix = rows_of(cols, depth, torch.bfloat16, "cpu", pad=8) * depth**-0.5
    out = rows_of(rows, cols, dtype, "cpu", pad=8, fill=NAN)
    products = products_of(machine, num_cores, tile)
    assert products.suits(x, matrix, out)
    products.launch(x, matrix, out)
    assert not products.arrivals.any()
    return out, x.float() @ matrix.float().t()


@pytest.mark.parametrize("least_share", [1, 4])
@pytest.mark.parametrize("num_cores", [1, 3, 4, 7])
@pytest.mark.parametrize("size", [(8, 256, 320), (3, 200, 136), (13, 64, 512), (16, 320, 64)], ids=str)
def test_it_agrees_with_the_reference(size: tuple[int, int, int], num_cores: int, least_share: int) -> None:
    """Lines that end inside column blocks, blocks of one and of many parts, columns and depths that fill no tile."""
    out, expected = multiply(Machine(SOURCE, seed=num_cores), size, num_cores, replace(TILE, least_share=least_share))
    assert_close(out, expected)


def test_float32_results() -> None:
    out, expected = multiply(Machine(SOURCE), (9, 264, 192), dtype=torch.float32)
    assert_close(out, expected, 1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_in_any_order_of_copies_and_programs(seed: int) -> None:
    out, expected = multiply(Machine(SOURCE, seed), (6, 192, 640), 5, replace(TILE, stages=2 + seed % 3))
    assert_close(out, expected)


def add(
    machine: Machine, size: tuple[int, int, int], num_cores: int = 3, tile: HopperProductTile = TILE
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The residual that a product was added to, that times a norm's weights, and the mean of its squares; and what is right."""
    rows, cols, depth = size
    x, residual = rows_of(rows, depth, torch.bfloat16, "cpu", pad=8), rows_of(rows, cols, torch.bfloat16, "cpu", pad=16)
    matrix, norm = rows_of(cols, depth, torch.bfloat16, "cpu") * depth**-0.5, torch.rand(cols) + 0.5
    out, products = rows_of(rows, cols, torch.bfloat16, "cpu", pad=8, fill=NAN), products_of(machine, num_cores, tile)
    expected = (residual.float() + x.float() @ matrix.float().t()).bfloat16()
    products.launch_added(x, matrix, residual, norm, out)
    assert not products.arrivals.any()
    squares = products.squares_of(cols)[:rows].sum(1, keepdim=True) / cols
    return (residual, out, squares), (expected, residual.float() * norm, residual.float().pow(2).mean(1, keepdim=True))


@pytest.mark.parametrize("num_cores", [1, 3, 7])
@pytest.mark.parametrize("size", [(8, 256, 320), (3, 200, 136), (13, 64, 512), (16, 2048, 64)], ids=str)
def test_sum_with_the_residual_and_half_a_norm(size: tuple[int, int, int], num_cores: int) -> None:
    for found, expected in zip(*add(Machine(SOURCE, seed=num_cores), size, num_cores), strict=True):
        assert_close(found, expected, 1e-5 if found.dtype == torch.float32 else None)


@pytest.mark.parametrize("seed", range(8))
def test_half_a_norm_in_any_order_of_copies_and_programs(seed: int) -> None:
    first = add(Machine(SOURCE, seed), (6, 192, 640), 5, replace(TILE, stages=2 + seed % 3))
    torch.manual_seed(0)
    again = add(Machine(SOURCE, seed + 1), (6, 192, 640), 5)
    assert_close(first[0][0], first[1][0])
    assert all(torch.equal(one, other) for one, other in zip(first[0], again[0], strict=True))


def test_a_row_does_not_depend_on_the_others() -> None:
    matrix, x = rows_of(128, 448, torch.bfloat16, "cpu"), rows_of(16, 448, torch.bfloat16, "cpu")
    results = []
    for rows in (2, 8, 16):
        out = rows_of(rows, 128, torch.bfloat16, "cpu", fill=NAN)
        products_of(Machine(SOURCE), 3).launch(x[:rows], matrix, out)
        results.append(out[:2])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_it_is_not_written_for() -> None:
    products = HopperProducts(launch_now, 1, *(torch.empty(0) for _ in range(3)))
    x, matrix, out = (torch.empty(4, 64, dtype=torch.bfloat16) for _ in range(3))
    assert products.suits(x, matrix, out)
    assert not products.suits(torch.empty(FEW_ROWS + 1, 64, dtype=torch.bfloat16), matrix, out)
    assert not products.suits(x, matrix, torch.empty(4, 4096, dtype=torch.bfloat16))
    assert not products.suits(x.float(), matrix.float(), out)
    assert not products.suits(torch.empty(4, 65, dtype=torch.bfloat16)[:, :64], matrix, out)


FAULTS = {  # what is done to the source
    "weights are not waited for": ("mbarrier.wait(ready.index(stage), (i // STAGES) & 1)", "pass"),
    "a stage is given up too early": (
        "            total = warpgroup_mma_wait",
        "            mbarrier.arrive(free.index(stage))\n            total = warpgroup_mma_wait",
    ),
    "a stage is never given up": ("mbarrier.arrive(free.index(stage))", "pass"),
    "the copies wait for no one": ("mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)", "pass"),
    "the rows are not expected": ("(TILE + ROWS) * TILE * 2", "TILE * TILE * 2"),
    "a part is not added": ("for base in range(0, parts, TOGETHER)", "for base in range(0, parts - 1, TOGETHER)"),
    "a part lies elsewhere": ("gl.where(base + j == 0, starts_inside, 0)", "starts_inside"),
    "nobody adds the parts": ("if arrived == parts - 1:", "if arrived == parts:"),
    "the arrivals stay": ("gl.store(arrivals + first_part, 0)", "pass"),
}


FAULTS_OF_SUMS = {
    "the residual is not read": ("before.to(gl.float32) + ", ""),
    "the residual is not written": ("gl.store(residual +", "(lambda *args, **kwargs: None)(residual +"),
    "squares of what is not rounded": ("total = rounded.to(gl.float32)", "total = before + gl.convert_layout(values, PLAIN)"),
    "squares lie elsewhere": ("// TILE) + tile", "// TILE)"),
    "squares of one row": ("gl.sum(total * total, axis=0)", "gl.sum(total * total, axis=0)[:1]"),
    "neighbours of another block": (
        "before, weight = _neighbours(residual, norm, tile,",
        "before, weight = _neighbours(residual, norm, 0,",
    ),
}


@pytest.mark.parametrize("fault", [*FAULTS, *FAULTS_OF_SUMS])
def test_the_model_finds(fault: str) -> None:
    """In one of a few orders: the kernel's own tests would fail with it."""
    before, after = {**FAULTS, **FAULTS_OF_SUMS}[fault]
    assert before in SOURCE.read_text()
    for seed in range(8):
        machine = Machine(SOURCE, seed, lambda source: source.replace(before, after))
        try:
            if fault in FAULTS:
                out, expected = multiply(machine, (6, 256, 640), 3, replace(TILE, together=1))
                assert_close(out, expected)
            else:
                for found, right in zip(*add(machine, (6, 256, 640)), strict=True):
                    assert_close(found, right, 1e-5 if found.dtype == torch.float32 else None)
        except (GluonFault, AssertionError):
            return
    pytest.fail("the model found nothing")
