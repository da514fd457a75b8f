"""Linear layers, packing and embeddings against the reference."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from brim.kernels.cpu.kernels import CpuKernels
from brim.kernels.torch_ref import TorchKernels

from .helpers import DTYPES, assert_close, poisoned, strided

SHAPES = [(1, 1, 2), (1, 640, 64), (3, 100, 48), (5, 16, 33), (8, 257, 96), (17, 1003, 31), (70, 130, 160), (260, 70, 40)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "out_features", "in_features"), SHAPES)
def test_linear(
    kernels: CpuKernels, reference: TorchKernels, rows: int, out_features: int, in_features: int, dtype: torch.dtype
) -> None:
    dense = torch.randn(out_features, in_features) / in_features**0.5
    bias = torch.randn(out_features)
    weight, expected_weight = (k.new_linear(out_features, in_features, dtype) for k in (kernels, reference))
    weight.load_rows(0, dense)
    expected_weight.load_rows(0, dense)
    x = strided(rows, in_features, dtype, pad=5)
    for out_dtype in (dtype, torch.float32):
        for b in (None, bias):
            out, expected = poisoned(rows, out_features, out_dtype, pad=3), poisoned(rows, out_features, out_dtype)
            kernels.linear(x, weight, out, b)
            reference.linear(x, expected_weight, expected, b)
            assert_close(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_deep_linear_is_cut_in_depth_blocks(kernels: CpuKernels, reference: TorchKernels, dtype: torch.dtype) -> None:
    dense, x = torch.randn(80, 9001) / 95, strided(9, 9001, dtype)
    weight, expected_weight = (k.new_linear(80, 9001, dtype) for k in (kernels, reference))
    weight.load_rows(0, dense)
    expected_weight.load_rows(0, dense)
    out, expected = poisoned(9, 80, torch.float32), poisoned(9, 80, torch.float32)
    kernels.linear(x, weight, out)
    reference.linear(x, expected_weight, expected)
    assert_close(out, expected, 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_in_memory_are_left_alone(kernels: CpuKernels, dtype: torch.dtype) -> None:
    weight = kernels.new_linear(37, 24, dtype)
    weight.load_rows(0, torch.randn(37, 24))
    whole = torch.full((4, 60), 7.0, dtype=dtype)
    kernels.linear(strided(4, 24, dtype), weight, whole[:, 3:40])
    assert (whole[:, :3] == 7).all() and (whole[:, 40:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (64, 64), (200, 70), (129, 33)])
def test_rows_are_packed_in_any_pieces(
    kernels: CpuKernels, out_features: int, in_features: int, source: torch.dtype, dtype: torch.dtype
) -> None:
    dense = torch.randn(out_features, in_features + 3).to(source)[:, :in_features]
    weight = kernels.new_linear(out_features, in_features, dtype)
    cuts = sorted({0, out_features // 3, out_features // 2, out_features})
    for first, last in reversed(list(pairwise(cuts))):
        weight.load_rows(first, dense[first:last])
    assert torch.equal(weight.to_dense(), dense.to(dtype))
    assert weight.num_bytes == kernels.linear_num_bytes(out_features, in_features, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_of_a_row_does_not_depend_on_its_neighbours(threaded: CpuKernels, dtype: torch.dtype) -> None:
    weight = threaded.new_linear(1003, 322, dtype)
    weight.load_rows(0, torch.randn(1003, 322))
    x = strided(70, 322, dtype)
    alone = torch.cat([_linear(threaded, x[i : i + 1], weight, 1003) for i in range(70)])
    for rows in (2, 6, 7, 8, 13, 16, 70):
        assert torch.equal(_linear(threaded, x[:rows], weight, 1003), alone[:rows])


def _linear(kernels: CpuKernels, x: torch.Tensor, weight: object, width: int) -> torch.Tensor:
    out = poisoned(x.shape[0], width, torch.float32)
    kernels.linear(x, weight, out)  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 640**0.5])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 48), (7, 33), (70, 80)])
def test_embed(kernels: CpuKernels, reference: TorchKernels, tokens: int, hidden: int, scale: float, dtype: torch.dtype) -> None:
    dense = torch.randn(203, hidden)
    weight, expected_weight = (k.new_linear(203, hidden, dtype) for k in (kernels, reference))
    weight.load_rows(0, dense)
    expected_weight.load_rows(0, dense)
    ids = torch.randint(0, 203, (tokens,))
    out, expected = poisoned(tokens, hidden, dtype, pad=2), poisoned(tokens, hidden, dtype)
    kernels.embed(ids, weight, scale, out)
    reference.embed(ids, expected_weight, scale, expected)
    assert torch.equal(out, expected)
