"""Row kernels, rotary embedding and products against the reference, on small shapes."""

from __future__ import annotations

import pytest
import torch

from brim.kernels.base import Activation
from brim.kernels.torch_ref import TorchKernels
from brim.kernels.triton.kernels import TritonKernels
from brim.kernels.triton.scratch import KernelLimits

from .helpers import DTYPES, AttentionShape, assert_close, attention_case, kernels_for, rows_of

NAN = float("nan")
SHAPE = AttentionShape([9], [29], 4, 2, 80)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(2, 640), (3, 33)])
def test_norms(device: str, rows: int, width: int, dtype: torch.dtype) -> None:
    kernels, reference = kernels_for(device, SHAPE), TorchKernels(device)
    x, residual, weight = rows_of(rows, width, dtype, device, 4), rows_of(rows, width, dtype, device, 2), torch.randn(width)
    weight = weight.to(device)
    out, expected = (rows_of(rows, width, dtype, device, fill=NAN) for _ in range(2))
    kernels.rms_norm(x, weight, 1e-6, out)
    reference.rms_norm(x, weight, 1e-6, expected)
    assert_close(out, expected)
    for post in (None, torch.randn(width, device=device)):
        mine, theirs = residual.clone(), residual.clone()
        aliased = x.clone()
        kernels.add_rms_norm(aliased, mine, weight, 1e-6, aliased, post)
        reference.add_rms_norm(x, theirs, weight, 1e-6, expected, post)
        assert_close(mine, theirs)
        assert_close(aliased, expected)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # infinity is what is meant
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_activation(device: str, activation: Activation) -> None:
    gate_up = rows_of(3, 2 * 70, torch.float32, device, pad=6)
    gate_up[0, 0], gate_up[-1, 69] = -100.0, 100.0
    out, expected = (rows_of(3, 70, torch.float32, device, fill=NAN) for _ in range(2))
    kernels_for(device, SHAPE).gated_activation(gate_up, out, activation)
    TorchKernels(device).gated_activation(gate_up, expected, activation)
    assert_close(out, expected)


def test_embed_and_gather(device: str) -> None:
    kernels, reference = kernels_for(device, SHAPE), TorchKernels(device)
    weight = kernels.new_linear(50, 33, torch.bfloat16)
    weight.load_rows(0, torch.randn(50, 33))
    ids = torch.tensor([3, 3, 49, 0], device=device)
    for scale in (1.0, 33**0.5):
        out, expected = (rows_of(4, 33, torch.bfloat16, device, fill=NAN) for _ in range(2))
        kernels.embed(ids, weight, scale, out)
        reference.embed(ids, weight, scale, expected)
        assert_close(out, expected, 0.0 if scale == 1.0 or device != "cpu" else None)  # the interpreter truncates to bfloat16
    kernels.gather_rows(weight.to_dense(), ids, out)
    assert torch.equal(out, weight.to_dense()[ids])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True])
def test_rope_and_cache(device: str, norms: bool, dtype: torch.dtype) -> None:
    cache, batch = attention_case(SHAPE, dtype, device)
    cache.nan_to_num_(7.0)
    expected_cache = cache.clone()
    tokens = 9
    qkv = rows_of(tokens, 8 * 80, dtype, device, pad=16)
    expected = qkv.clone()
    cos_sin, positions = torch.randn(200, 80, device=device), torch.randint(0, 200, (tokens,), device=device)
    slots = batch.slot_mapping.clone()
    slots[0] = -1
    norm = (torch.randn(80, device=device), torch.randn(80, device=device), 1e-6) if norms else (None, None, 0.0)
    kernels_for(device, SHAPE).rope_and_cache(qkv, positions, cos_sin, cache, slots, 4, *norm)
    TorchKernels(device).rope_and_cache(expected, positions, cos_sin, expected_cache, slots, 4, *norm)
    assert_close(qkv, expected)
    assert_close(cache, expected_cache)


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(device: str, rows: int, biased: bool) -> None:
    kernels, reference = kernels_for(device, SHAPE), TorchKernels(device)
    weight = kernels.new_linear(70, 48, torch.float16)
    weight.load_rows(0, torch.randn(70, 48))
    bias = torch.randn(70, device=device) if biased else None
    x = rows_of(rows, 48, torch.float16, device, pad=8)
    for dtype in (torch.float16, torch.float32):
        out, expected = rows_of(rows, 70, dtype, device, pad=10, fill=NAN), rows_of(rows, 70, torch.float32, device, fill=NAN)
        kernels.linear(x, weight, out, bias)
        reference.linear(x, weight, expected, bias)
        assert_close(out, expected)


def test_scratch_is_what_the_limits_say(device: str) -> None:
    limits = KernelLimits(256, 32, 8, 128, 128256)
    kernels = TritonKernels(device, limits)
    assert kernels.scratch_bytes == limits.scratch_bytes(kernels.num_cores)
    assert limits.buffer_shapes(132)["sums"][0] == (2 * 132 * 128 * 128,)
