"""Products and look-ups over quantised weights against what dequantising and exact arithmetic give."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from brim.formats.ggml_type import GGMLType
from brim.kernels.base import LinearWeight, StoredRows
from brim.kernels.cpu.kernels import CpuKernels
from brim.kernels.cpu.quantized import BLOCK_TYPES, JoinedWeight
from brim.kernels.dequantize import dequantize
from brim.kernels.torch_ref import TorchKernels

from .conftest import library
from .helpers import DTYPES, assert_close, poisoned, random_blocks, strided

TYPES = sorted(BLOCK_TYPES)
IDS = [kind.name for kind in TYPES]
SHAPES = [(1, 1, 256), (2, 640, 256), (3, 100, 512), (5, 16, 768), (17, 203, 1280), (70, 130, 256)]


def blocks_of(kind: GGMLType, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Random rows of blocks as stored, and their values [rows, cols] float32."""
    raw = random_blocks(kind, rows, cols)
    dense = torch.empty(rows, cols)
    dequantize(raw, kind, rows, cols, dense)
    return torch.from_numpy(raw), dense


def stored(kernels: CpuKernels, raw: Tensor, kind: GGMLType, cols: int, dtype: torch.dtype) -> LinearWeight:
    weight = kernels.new_stored_linear([StoredRows(raw.shape[0], kind)], cols, dtype)
    weight.load_blocks(0, raw)
    return weight


def as_bytes(x: Tensor) -> Tensor:
    """What a row becomes: sub-blocks of 32 whose largest magnitude is 127, in float64."""
    blocks = x.float().reshape(x.shape[0], -1, 32)
    most = blocks.abs().amax(-1, keepdim=True)
    quantised = (blocks * torch.where(most > 0, torch.tensor(127.0) / most, torch.tensor(0.0))).round()
    return (quantised.double() * (most * torch.tensor(1 / 127)).double()).reshape(x.shape)


def product(kernels: CpuKernels, x: Tensor, weight: LinearWeight, bias: Tensor | None = None) -> Tensor:
    out = poisoned(x.shape[0], weight.out_features, torch.float32, pad=3)
    kernels.linear(x, weight, out, bias)
    return out


@pytest.mark.parametrize("kind", TYPES, ids=IDS)
@pytest.mark.parametrize(("rows", "out_features", "in_features"), SHAPES)
def test_linear(kernels: CpuKernels, rows: int, out_features: int, in_features: int, kind: GGMLType) -> None:
    raw, dense = blocks_of(kind, out_features, in_features)
    bias = torch.randn(out_features)
    for dtype in DTYPES:
        weight = stored(kernels, raw, kind, in_features, dtype)
        x = strided(rows, in_features, dtype, pad=5)
        exact = as_bytes(x) @ dense.double().T
        assert_close(product(kernels, x, weight), exact, 1e-6)
        assert_close(product(kernels, x, weight, bias), exact + bias, 1e-6)
        out = poisoned(rows, out_features, dtype, pad=3)
        kernels.linear(x, weight, out)
        assert_close(out, exact)


@pytest.mark.parametrize("kind", TYPES, ids=IDS)
def test_close_to_the_product_without_rounding_rows(kernels: CpuKernels, kind: GGMLType) -> None:
    """Rounding to 127 steps of a sub-block's largest costs less than 1 % of a result's usual size."""
    raw, dense = blocks_of(kind, 96, 1024)
    x = strided(20, 1024, torch.bfloat16)
    exact = x.double() @ dense.double().T
    error = (product(kernels, x, stored(kernels, raw, kind, 1024, torch.bfloat16)) - exact).square().mean().sqrt()
    assert error <= 0.01 * exact.square().mean().sqrt()


@pytest.mark.parametrize("kind", TYPES, ids=IDS)
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 256), (64, 512), (129, 256), (200, 768)])
def test_blocks_are_stored_in_any_pieces(kernels: CpuKernels, out_features: int, in_features: int, kind: GGMLType) -> None:
    """And come back as the values that dequantising gives, bit for bit."""
    raw, dense = blocks_of(kind, out_features, in_features)
    parts = [StoredRows(out_features, kind)]
    weight = kernels.new_stored_linear(parts, in_features, torch.bfloat16)
    for first, last in reversed(list(pairwise(sorted({0, out_features // 3, out_features // 2, out_features})))):
        weight.load_blocks(first, raw[first:last])
    assert torch.equal(weight.to_dense(), dense)
    assert weight.num_bytes == kernels.stored_num_bytes(parts, in_features, torch.bfloat16)
    assert weight.num_bytes == raw.shape[1] * -(-out_features // 16) * 16


@pytest.mark.parametrize("kind", TYPES, ids=IDS)
def test_result_of_a_row_does_not_depend_on_its_neighbours_nor_on_threads(kind: GGMLType) -> None:
    raw, _ = blocks_of(kind, 203, 768)
    x = strided(70, 768, torch.bfloat16)
    found = []
    for num_threads in (1, 2, 3):
        kernels = CpuKernels(library("native"), num_threads)
        weight = stored(kernels, raw, kind, 768, torch.bfloat16)
        found.append(torch.cat([product(kernels, x[i : i + 1], weight) for i in range(70)]))
        for rows in (2, 3, 4, 8, 13, 16, 21, 22, 70):
            assert torch.equal(product(kernels, x[:rows], weight), found[0][:rows])
        kernels.close()
    assert torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])


def test_more_rows_than_are_quantised_at_once(kernels: CpuKernels) -> None:
    raw, dense = blocks_of(GGMLType.Q8_0, 40, 8192)
    weight = stored(kernels, raw, GGMLType.Q8_0, 8192, torch.bfloat16)
    x = strided(260, 8192, torch.bfloat16)
    whole = product(kernels, x, weight)
    assert_close(whole, as_bytes(x) @ dense.double().T, 1e-6)
    assert torch.equal(product(kernels, x[200:], weight), whole[200:])


@pytest.mark.parametrize("kind", TYPES, ids=IDS)
def test_extreme_rows(kernels: CpuKernels, kind: GGMLType) -> None:
    """Scales from 1e-35 to 1e30 in one row, rows of zeros, one large element beside small ones, and the largest of all sums."""
    raw, dense = blocks_of(kind, 70, 512)
    weight = stored(kernels, raw, kind, 512, torch.float32)
    x = torch.randn(6, 512)
    x[0] *= torch.logspace(-35, 30, 512)
    x[1] = 0.0
    x[2, ::32] = 1e4
    x[3] *= 1e-41
    x[4] = 3.0
    x[5] = torch.where(dense[0] > 0, 1.0, -1.0)
    out, exact = product(kernels, x, weight), as_bytes(x) @ dense.double().T
    for row in (0, 1, 2, 4, 5):
        assert_close(
            out[row : row + 1] / max(1.0, exact[row].abs().max()), exact[row : row + 1] / max(1.0, exact[row].abs().max()), 1e-6
        )
    assert (out[1] == 0).all() and (out[3] == 0).all(), "what is below 2^-120 counts as nothing"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_spoils_only_itself(kernels: CpuKernels, bad: float) -> None:
    raw, _ = blocks_of(GGMLType.Q5_0, 70, 512)
    weight = stored(kernels, raw, GGMLType.Q5_0, 512, torch.bfloat16)
    x = strided(5, 512, torch.bfloat16)
    clean = product(kernels, x, weight)
    x[2, 77] = bad
    out = product(kernels, x, weight)
    assert not out[2].isfinite().any()
    assert torch.equal(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_neighbours_in_memory_are_left_alone(kernels: CpuKernels) -> None:
    raw, _ = blocks_of(GGMLType.Q4_K, 37, 256)
    whole = torch.full((4, 60), 7.0, dtype=torch.bfloat16)
    kernels.linear(strided(4, 256, torch.bfloat16), stored(kernels, raw, GGMLType.Q4_K, 256, torch.bfloat16), whole[:, 3:40])
    assert (whole[:, :3] == 7).all() and (whole[:, 40:] == 7).all()


@pytest.mark.parametrize("kind", TYPES, ids=IDS)
@pytest.mark.parametrize("scale", [1.0, 640**0.5])
def test_embed(kernels: CpuKernels, reference: TorchKernels, kind: GGMLType, scale: float) -> None:
    raw, dense = blocks_of(kind, 203, 512)
    expected_weight = reference.new_linear(203, 512, torch.float32)
    expected_weight.load_rows(0, dense)
    for dtype in (torch.float32, torch.bfloat16):
        weight = stored(kernels, raw, kind, 512, dtype)
        for tokens in (1, 7, 70):
            ids = torch.randint(0, 203, (tokens,))
            out, expected = poisoned(tokens, 512, dtype, pad=2), poisoned(tokens, 512, dtype)
            kernels.embed(ids, weight, scale, out)
            reference.embed(ids, expected_weight, scale, expected)
            assert torch.equal(out, expected)


def test_parts_kept_in_different_ways_are_one_matrix(kernels: CpuKernels) -> None:
    """As qkv of a mixed file: neighbours of one type are one part, and what is not quantised is packed as ever."""
    first, first_dense = blocks_of(GGMLType.Q5_0, 150, 256)
    last, last_dense = blocks_of(GGMLType.Q8_0, 37, 256)
    middle = torch.randn(48, 256)
    parts = [StoredRows(100, GGMLType.Q5_0), StoredRows(50, GGMLType.Q5_0), StoredRows(48), StoredRows(37, GGMLType.Q8_0)]
    weight = kernels.new_stored_linear(parts, 256, torch.float32)
    assert isinstance(weight, JoinedWeight) and len(weight.parts) == 3 and weight.out_features == 235
    assert weight.num_bytes == kernels.stored_num_bytes(parts, 256, torch.float32)
    assert [weight.block_type_of(row) for row in (0, 149, 150, 198)] == [GGMLType.Q5_0, GGMLType.Q5_0, None, GGMLType.Q8_0]
    weight.load_blocks(0, first[:100])
    weight.load_blocks(100, first[100:])
    weight.load_rows(150, middle)
    weight.load_blocks(198, last)
    dense = torch.cat([first_dense, middle, last_dense])
    assert torch.equal(weight.to_dense(), dense)
    bias, x = torch.randn(235), strided(4, 256, torch.float32)
    exact = torch.cat(
        [as_bytes(x) @ first_dense.double().T, x.double() @ middle.double().T, as_bytes(x) @ last_dense.double().T], 1
    )
    assert_close(product(kernels, x, weight, bias), exact + bias, 2e-5)


def test_recorded_products_run_again_over_new_values(kernels: CpuKernels) -> None:
    raw, dense = blocks_of(GGMLType.Q6_K, 100, 256)
    weight = stored(kernels, raw, GGMLType.Q6_K, 256, torch.float32)
    x, out = torch.zeros(3, 256), poisoned(3, 100, torch.float32)
    with kernels.record() as program:
        kernels.linear(x, weight, out)
    for _ in range(2):
        x.copy_(torch.randn(3, 256))
        program.replay()
        assert_close(out, as_bytes(x) @ dense.double().T, 1e-6)


def test_every_bit_pattern_is_a_block_the_native_code_knows() -> None:
    """One type here is one in csrc/blocks.c: a type that only one side knew would leave results unwritten."""
    kernels = CpuKernels(library("native"), 1)
    for kind in TYPES:
        raw, _ = blocks_of(kind, 16, 256)
        assert np.isfinite(product(kernels, torch.ones(1, 256), stored(kernels, raw, kind, 256, torch.float32)).numpy()).all()
    kernels.close()
