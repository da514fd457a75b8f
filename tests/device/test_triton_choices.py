"""Kernels that can be chosen instead of today's, on a GPU: the same results, alone, one after the other and in graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.unit.kernels_triton.helpers import AttentionShape, assert_attention, assert_close, attention_case, rows_of

from brim.config.model_spec import spec_from_hf_config
from brim.kernels.base import FoldedNorm
from brim.kernels.torch_ref import TorchKernels
from brim.kernels.triton.choice import CHOSEN, KernelChoice
from brim.kernels.triton.kernels import TritonKernels
from brim.kernels.triton.scratch import KernelLimits

pytestmark = [pytest.mark.device, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE, BF16 = "cuda", torch.bfloat16
LLAMA_8B = AttentionShape([], [], 32, 8, 128)
QWEN_06B = AttentionShape([], [], 16, 8, 128)
FUSED = [replace(CHOSEN, dependent_launch=False), replace(CHOSEN, split_norm=False), CHOSEN]
SIZES = [(4096, 1024, 3072), (6144, 4096, 14336)]  # qkv, hidden, intermediate


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def kernels_of(choice: KernelChoice, shape: AttentionShape = LLAMA_8B, vocab: int = 1000) -> TritonKernels:
    return TritonKernels(DEVICE, KernelLimits(256, shape.heads, shape.kv_heads, shape.head_dim, vocab), choice=choice)


@pytest.mark.parametrize("choice", FUSED, ids=("in order", "early", "split norm"))
@pytest.mark.parametrize("sizes", SIZES, ids=("0.6b", "8b"))
@pytest.mark.parametrize("rows", [1, 2, 8, 13, 16, 17])
def test_a_layer_of_products(rows: int, sizes: tuple[int, int, int], choice: KernelChoice) -> None:
    """Products that read each other's results, many times over in one graph: each waits for the one before."""
    qkv_size, hidden, inner = sizes
    ours, reference = kernels_of(choice), TorchKernels(DEVICE)
    shapes = {"qkv": (qkv_size, hidden), "out": (hidden, qkv_size), "gate_up": (2 * inner, hidden), "down": (hidden, inner)}
    weights = {}
    for name, size in shapes.items():
        weights[name] = ours.new_linear(*size, BF16)
        weights[name].load_rows(0, torch.randn(*size, device=DEVICE) * 0.5 * size[1] ** -0.5)
    spec = spec_from_hf_config(
        {"model_type": "llama", "vocab_size": 100, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 1,
         "num_attention_heads": qkv_size // 128, "head_dim": 128, "max_position_embeddings": 64}
    )  # fmt: skip
    norm = torch.rand(hidden, device=DEVICE) + 0.5
    start = rows_of(rows, hidden, BF16, DEVICE)
    residual, qkv, active = start.clone(), *(rows_of(rows, n, BF16, DEVICE, fill=float("nan")) for n in (qkv_size, inner))
    expected, hidden_rows = start.clone(), torch.empty_like(start)
    gate_up, product = rows_of(rows, 2 * inner, BF16, DEVICE), torch.empty_like(start)

    def few_rows() -> None:
        residual.copy_(start)
        for _ in range(4):
            ours.rms_norm(residual, norm, 1e-6, hidden_rows)
            ours.linear(hidden_rows, weights["qkv"], qkv)
            ours.linear(qkv, weights["out"], product)
            ours.add_rms_norm(product, residual, norm, 1e-6, hidden_rows)
            ours.gated_linear(hidden_rows, weights["gate_up"], gate_up, active, "silu")
            ours.linear(active, weights["down"], product)
            residual.add_(product)

    def fused() -> None:
        residual.copy_(start)
        folded = FoldedNorm(residual, norm, 1e-6, hidden_rows)
        ours.rms_norm(residual, norm, 1e-6, hidden_rows)
        ours.linear(hidden_rows, weights["qkv"], qkv)
        for layer in range(4):
            ours.add_linear(qkv, weights["out"], folded)
            ours.norm_gated_linear(folded, weights["gate_up"], "silu", active)
            ours.add_linear(active, weights["down"], folded)
            if layer < 3:
                ours.norm_linear(folded, weights["qkv"], qkv)

    theirs, activated = torch.empty_like(qkv), torch.empty_like(active)
    for _ in range(4):
        reference.rms_norm(expected, norm, 1e-6, hidden_rows)
        reference.linear(hidden_rows, weights["qkv"], theirs)
        reference.linear(theirs, weights["out"], product)
        expected += product
        reference.rms_norm(expected, norm, 1e-6, hidden_rows)
        reference.linear(hidden_rows, weights["gate_up"], gate_up)
        reference.gated_activation(gate_up, activated, "silu")
        reference.linear(activated, weights["down"], product)
        expected += product
    layers = fused if rows <= ours.fused_rows(spec, BF16) else few_rows
    layers()
    assert_close(residual, expected, 0.03)
    first = residual.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers()
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(residual, first), "a kernel read what the one before had not written yet"


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_logits_of_few_rows(rows: int) -> None:
    ours, reference = kernels_of(CHOSEN), TorchKernels(DEVICE)
    weight = ours.new_linear(151936, 1024, BF16)
    weight.load_rows(0, torch.randn(151936, 1024, device=DEVICE) * 0.03)
    x, out = rows_of(rows, 1024, BF16, DEVICE), torch.full((rows, 151936), float("nan"), device=DEVICE)
    expected = torch.empty_like(out)
    ours.linear(x, weight, out)
    reference.linear(x, weight, expected)
    assert_close(out, expected, 1e-3)


@pytest.mark.parametrize("shape", [LLAMA_8B, QWEN_06B, replace(LLAMA_8B, heads=8, kv_heads=1)], ids=("4", "2", "8"))
@pytest.mark.parametrize(
    "lengths",
    [
        ([8000], [8000]), ([700, 45], [700, 3000]), ([129], [129]), ([128], [128]), ([127, 640], [127, 641]),
        ([1, 130, 1, 64], [2000, 130, 40, 4000]), ([2048], [20000]), ([33] * 40, [33 + 111 * i for i in range(40)]),
    ],
    ids=str,
)  # fmt: skip
def test_prefill_attention_for_hopper(lengths: tuple[list[int], list[int]], shape: AttentionShape) -> None:
    kernels = kernels_of(KernelChoice(hopper=True))
    if not kernels.chip.hopper:
        pytest.skip("written for another chip")
    assert_attention(kernels, replace(shape, query_lens=lengths[0], seq_lens=lengths[1]), BF16, DEVICE)


def test_prefill_attention_for_hopper_is_the_same_every_time() -> None:
    kernels = kernels_of(KernelChoice(hopper=True))
    if not kernels.chip.hopper:
        pytest.skip("written for another chip")
    cache, batch = attention_case(replace(LLAMA_8B, query_lens=[3000, 77], seq_lens=[3000, 5000]), BF16, DEVICE)
    q = rows_of(3077, 4096, BF16, DEVICE)
    outs = [torch.empty_like(q) for _ in range(20)]
    for out in outs:
        kernels.attention(q, cache, batch, 0.088, 0.0, out)
    assert all(torch.equal(out, outs[0]) for out in outs[1:])


@pytest.mark.parametrize("lengths", [([1], [32000]), ([1] * 5, [1, 900, 16, 5000, 33]), ([700, 1], [700, 3000])], ids=str)
def test_attention_that_starts_early(lengths: tuple[list[int], list[int]]) -> None:
    kernels = kernels_of(KernelChoice(dependent_launch=True))
    assert_attention(kernels, replace(LLAMA_8B, query_lens=lengths[0], seq_lens=lengths[1]), BF16, DEVICE)
