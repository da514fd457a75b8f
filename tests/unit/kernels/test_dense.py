"""Norms, activations, gathers and rotary embedding against the reference."""

from __future__ import annotations

import pytest
import torch

from brim.kernels.base import Activation
from brim.kernels.cpu.kernels import CpuKernels
from brim.kernels.torch_ref import TorchKernels

from .helpers import DTYPES, assert_close, attention_case, poisoned, strided

SIZES = [(1, 640), (1, 5), (3, 33), (70, 80)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_rms_norm(kernels: CpuKernels, reference: TorchKernels, rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight = strided(rows, width, dtype, pad=4), torch.randn(width)
    out, expected = poisoned(rows, width, dtype, pad=1), poisoned(rows, width, dtype)
    kernels.rms_norm(x, weight, 1e-6, out)
    reference.rms_norm(x, weight, 1e-6, expected)
    assert_close(out, expected)
    kernels.rms_norm(x, weight, 1e-6, x)
    assert torch.equal(x, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_add_rms_norm(
    kernels: CpuKernels, reference: TorchKernels, rows: int, width: int, post: bool, dtype: torch.dtype
) -> None:
    x, residual, weight = strided(rows, width, dtype, 4), strided(rows, width, dtype, 2), torch.randn(width)
    post_weight = torch.randn(width) if post else None
    expected_residual = residual.clone()
    out, expected = poisoned(rows, width, dtype), poisoned(rows, width, dtype)
    reference.add_rms_norm(x, expected_residual, weight, 1e-6, expected, post_weight)
    kept = residual.clone()
    kernels.add_rms_norm(x, residual, weight, 1e-6, out, post_weight)
    assert_close(residual, expected_residual)
    assert_close(out, expected)
    kernels.add_rms_norm(x, kept, weight, 1e-6, x, post_weight)
    assert torch.equal(x, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_gated_activation(
    kernels: CpuKernels, reference: TorchKernels, rows: int, width: int, activation: Activation, dtype: torch.dtype
) -> None:
    gate_up = strided(rows, 2 * width, dtype, pad=6)
    gate_up[0, 0] = -100.0
    gate_up[-1, width - 1] = 100.0
    out, expected = poisoned(rows, width, dtype, pad=3), poisoned(rows, width, dtype)
    kernels.gated_activation(gate_up, out, activation)
    reference.gated_activation(gate_up, expected, activation)
    assert_close(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_rows(kernels: CpuKernels, dtype: torch.dtype) -> None:
    x, rows = strided(20, 33, dtype, pad=3), torch.tensor([3, 3, 19, 0, 7])
    out = poisoned(5, 33, dtype, pad=1)
    kernels.gather_rows(x, rows, out)
    assert torch.equal(out, x[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_dim"), [(1, 4, 1, 256), (9, 4, 2, 80), (70, 6, 3, 64)])
def test_rope_and_cache(
    kernels: CpuKernels,
    reference: TorchKernels,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    norms: bool,
    dtype: torch.dtype,
) -> None:
    cache, batch = attention_case([tokens], [tokens + 20], kv_heads, head_dim, dtype)
    cache.nan_to_num_(7.0)
    expected_cache = cache.clone()
    qkv = strided(tokens, (heads + 2 * kv_heads) * head_dim, dtype, pad=16)
    expected = qkv.clone()
    cos_sin = torch.randn(200, head_dim)
    positions = torch.randint(0, 200, (tokens,))
    slots = batch.slot_mapping.clone()
    slots[0] = -1
    norm = (torch.randn(head_dim), torch.randn(head_dim), 1e-6) if norms else (None, None, 0.0)
    kernels.rope_and_cache(qkv, positions, cos_sin, cache, slots, heads, *norm)
    reference.rope_and_cache(expected, positions, cos_sin, expected_cache, slots, heads, *norm)
    assert_close(qkv, expected)
    assert_close(cache, expected_cache)
