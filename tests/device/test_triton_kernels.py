"""Triton kernels on a GPU: real shapes against the reference in float32, graphs, and no allocation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tests.unit.kernels_triton.helpers import (
    DTYPES,
    AttentionShape,
    assert_attention,
    assert_close,
    assert_same_samples,
    attention_case,
    kernels_for,
    padded,
    rows_of,
    sampling_batch,
)
from torch import Tensor

from brim.kernels.torch_ref import TorchKernels

pytestmark = [pytest.mark.device, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = "cuda"
LLAMA_8B = AttentionShape([], [], 32, 8, 128)
QWEN_06B = AttentionShape([], [], 16, 8, 128)
HEADS = [(8, 2, 64), (4, 4, 80), (8, 1, 96), (32, 8, 128), (16, 8, 128), (4, 1, 256), (6, 2, 128), (12, 12, 64)]
FEW_HEADS = [(4, 4, 80), (32, 8, 128), (4, 1, 256)]
LENGTHS = [
    ([1], [32000]),
    ([1] * 5, [1, 900, 16, 5000, 33]),
    ([700, 45], [700, 3000]),
    ([1, 130, 1, 2], [2000, 130, 40, 4000]),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    if dtype != torch.bfloat16 and heads not in FEW_HEADS:
        pytest.skip("one type is enough for this shape")
    for lengths in LENGTHS:
        shape = AttentionShape(*lengths, *heads)
        kernels = kernels_for(DEVICE, shape, max_num_seqs=8)
        assert_attention(kernels, shape, dtype, DEVICE)
        if heads in FEW_HEADS:
            assert_attention(kernels, replace(shape, window=300, softcap=30.0), dtype, DEVICE)


@pytest.mark.parametrize("query_lens", [[4000], [1] * 64, [8, 1, 1, 2500]], ids=len)
def test_long_attention_in_one_batch(query_lens: list[int]) -> None:
    seq_lens = [n + 700 * i for i, n in enumerate(query_lens)] if len(query_lens) < 64 else [1 + 150 * i for i in range(64)]
    shape = replace(LLAMA_8B, query_lens=query_lens, seq_lens=seq_lens)
    assert_attention(kernels_for(DEVICE, shape, max_num_seqs=256), shape, torch.bfloat16, DEVICE)


def test_a_cache_of_more_than_2_to_the_31_elements() -> None:
    block_elements = 3 * 2 * 16 * 8 * 128
    blocks = 2**31 // block_elements + 200
    pool = torch.empty(blocks, 3, 2, 16, 8, 128, dtype=torch.bfloat16, device=DEVICE)
    shape = replace(LLAMA_8B, query_lens=[1, 40], seq_lens=[1500, 900])
    cache, batch = attention_case(shape, torch.bfloat16, DEVICE)
    far = pool[:, 1]
    far[-len(cache) :].copy_(cache)
    moved = replace(batch, block_tables=batch.block_tables + (blocks - len(cache)))
    q = rows_of(41, 32 * 128, torch.bfloat16, DEVICE)
    near_out, far_out = torch.empty_like(q), torch.empty_like(q)
    kernels = kernels_for(DEVICE, shape)
    kernels.attention(q, cache, batch, 0.1, 0.0, near_out)
    kernels.attention(q, far, moved, 0.1, 0.0, far_out)
    assert torch.equal(near_out, far_out)
    slots = batch.slot_mapping + (blocks - len(cache)) * 16
    qkv, cos_sin = rows_of(41, 48 * 128, torch.bfloat16, DEVICE), torch.randn(100, 128, device=DEVICE)
    positions = torch.arange(41, device=DEVICE)
    kernels.rope_and_cache(qkv.clone(), positions, cos_sin, cache, batch.slot_mapping, 32)
    kernels.rope_and_cache(qkv.clone(), positions, cos_sin, far, slots, 32)
    assert torch.equal(cache.nan_to_num(), far[-len(cache) :].nan_to_num())


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    shape = replace(LLAMA_8B, query_lens=[1] * 40, seq_lens=[4000] + [137 * i + 1 for i in range(39)])
    kernels = kernels_for(DEVICE, shape)
    cache, batch = attention_case(shape, torch.bfloat16, DEVICE)
    q = rows_of(40, 4096, torch.bfloat16, DEVICE)
    out, alone = torch.empty_like(q), torch.empty_like(q)
    kernels.attention(q, cache, batch, 0.088, 0.0, out)
    kernels.attention(q[:1], cache, replace(batch, num_seqs=1), 0.088, 0.0, alone[:1])
    assert_close(alone[:1], out[:1], 4e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [640, 1024, 4096, 5120])
@pytest.mark.parametrize("rows", [1, 70, 3000])
def test_row_kernels(rows: int, width: int, dtype: torch.dtype) -> None:
    kernels, reference = kernels_for(DEVICE, replace(QWEN_06B, seq_lens=[1])), TorchKernels(DEVICE)
    x, residual = (rows_of(rows, width, dtype, DEVICE) for _ in range(2))
    weight, post = torch.randn(width, device=DEVICE), torch.randn(width, device=DEVICE)
    out, expected = (rows_of(rows, width, dtype, DEVICE, fill=float("nan")) for _ in range(2))
    for extra in (None, post):
        mine, theirs = residual.clone(), residual.clone()
        kernels.add_rms_norm(x, mine, weight, 1e-5, out, extra)
        reference.add_rms_norm(x, theirs, weight, 1e-5, expected, extra)
        assert_close(mine, theirs)
        assert_close(out, expected)
    kernels.rms_norm(x, weight, 1e-5, out)
    reference.rms_norm(x, weight, 1e-5, expected)
    assert_close(out, expected)
    gate_up = rows_of(rows, 2 * width, dtype, DEVICE)
    for activation in ("silu", "gelu_tanh"):
        kernels.gated_activation(gate_up, out, activation)
        reference.gated_activation(gate_up, expected, activation)
        assert_close(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 65, 2000])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_rope_and_cache(heads: tuple[int, int, int], tokens: int, dtype: torch.dtype) -> None:
    shape = AttentionShape([tokens], [tokens + 20], *heads)
    cache, batch = attention_case(shape, dtype, DEVICE)
    cache.nan_to_num_(7.0)
    expected_cache = cache.clone()
    qkv = rows_of(tokens, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, dtype, DEVICE)
    expected = qkv.clone()
    cos_sin = torch.randn(4000, shape.head_dim, device=DEVICE)
    positions = torch.randint(0, 4000, (tokens,), device=DEVICE)
    slots = batch.slot_mapping.clone()
    slots[tokens // 2] = -1
    norm = torch.randn(shape.head_dim, device=DEVICE)
    for norms in ((None, None, 0.0), (norm, norm + 1, 1e-6)):
        kernels_for(DEVICE, shape).rope_and_cache(qkv, positions, cos_sin, cache, slots, shape.heads, *norms)
        TorchKernels(DEVICE).rope_and_cache(expected, positions, cos_sin, expected_cache, slots, shape.heads, *norms)
        assert_close(qkv, expected)
        assert_close(cache, expected_cache)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols", "depth"), [(1, 6144, 4096), (8, 1024, 3072), (300, 4096, 1024), (5, 50257, 640)])
def test_linear(rows: int, cols: int, depth: int, dtype: torch.dtype) -> None:
    kernels, reference = kernels_for(DEVICE, replace(QWEN_06B, seq_lens=[1])), TorchKernels(DEVICE)
    weight = kernels.new_linear(cols, depth, dtype)
    weight.load_rows(0, torch.randn(cols, depth, device=DEVICE) * depth**-0.5)
    x, bias = rows_of(rows, depth, dtype, DEVICE, pad=16), torch.randn(cols, device=DEVICE)
    for out_dtype in {dtype, torch.float32}:
        for added in (None, bias):
            out = rows_of(rows, cols, out_dtype, DEVICE, pad=24, fill=float("nan"))
            expected = rows_of(rows, cols, torch.float32, DEVICE, fill=float("nan"))
            kernels.linear(x, weight, out, added)
            reference.linear(x, weight, expected, added)
            assert_close(out, expected)


@pytest.mark.parametrize(("rows", "vocab", "spread"), [(1, 128256, 2.0), (64, 151936, 1.0), (40, 262144, 8.0), (40, 50257, 0.01)])
def test_sample(rows: int, vocab: int, spread: float) -> None:
    logits = torch.randn(rows, vocab, device=DEVICE) * spread
    kernels = kernels_for(DEVICE, replace(QWEN_06B, seq_lens=[1] * rows), vocab)
    assert_same_samples(kernels, logits, sampling_batch(rows, DEVICE))
    assert_same_samples(kernels, logits, sampling_batch(rows, DEVICE, truncated=False))
    assert_same_samples(kernels, logits.round(), sampling_batch(rows, DEVICE, greedy=True))


def _captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of work, warmed up first; neither running nor capturing it may take device memory."""
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    work()
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before, "a step allocates"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def test_a_graph_of_decode_follows_the_lengths_of_the_batch() -> None:
    seqs, vocab = 12, 128256
    shape = replace(LLAMA_8B, query_lens=[1] * seqs, seq_lens=[300 * i + 1 for i in range(seqs)])
    kernels = kernels_for(DEVICE, shape, vocab, max_num_seqs=16)
    cache, real = attention_case(shape, torch.bfloat16, DEVICE)
    cache.nan_to_num_(0.5)
    batch = padded(real, 16)
    batch.block_tables.clamp_(max=len(cache) - 1)
    batch.query_start.copy_(torch.arange(17))
    slots = torch.cat([real.slot_mapping, real.slot_mapping.new_full((4,), -1)])
    qkv, out = rows_of(16, 48 * 128, torch.bfloat16, DEVICE), rows_of(16, 4096, torch.bfloat16, DEVICE)
    source, cos_sin = qkv.clone(), torch.randn(4000, 128, device=DEVICE)
    positions = (batch.seq_lens.long() - 1).clamp(min=0)
    weight = kernels.new_linear(vocab, 4096, torch.bfloat16)
    weight.load_rows(0, torch.randn(vocab, 4096, device=DEVICE) * 0.02)
    hidden, residual = torch.zeros_like(out), torch.zeros_like(out)
    norm, logits = torch.ones(4096, device=DEVICE), torch.empty(16, vocab, device=DEVICE)
    settings, ids = sampling_batch(16, DEVICE), torch.zeros(16, dtype=torch.int64, device=DEVICE)

    def step() -> None:
        qkv.copy_(source)
        kernels.rope_and_cache(qkv, positions, cos_sin, cache, slots, 32)
        kernels.attention(qkv[:, :4096], cache, batch, 0.088, 0.0, out)
        residual.zero_()
        kernels.add_rms_norm(out, residual, norm, 1e-5, hidden)
        kernels.linear(hidden, weight, logits)
        kernels.sample(logits, settings, ids)

    graph = _captured(step)
    for lens in (shape.seq_lens, [3] * seqs, [3301 - 300 * i for i in range(seqs)]):
        # the blocks of a longer sequence are borrowed: what is read need not make sense, only be the same
        batch.seq_lens[:seqs].copy_(torch.tensor(lens))
        batch.block_tables.copy_(torch.randint(0, len(cache), batch.block_tables.shape))
        results: list[tuple[Tensor, ...]] = []
        for run in (step, graph.replay):
            ids.fill_(-1)
            logits.fill_(float("nan"))
            run()
            torch.cuda.synchronize()
            results.append((out.clone(), logits.clone(), ids.clone(), cache.clone()))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_graph_of_a_mixed_step_and_of_log_probabilities() -> None:
    shape = replace(QWEN_06B, query_lens=[1, 200, 1, 31], seq_lens=[500, 600, 40, 31])
    kernels = kernels_for(DEVICE, shape, 151936)
    cache, batch = attention_case(shape, torch.bfloat16, DEVICE)
    q = rows_of(233, 2048, torch.bfloat16, DEVICE)
    out, expected = torch.empty_like(q), torch.empty_like(q)
    logits, chosen = torch.randn(4, 151936, device=DEVICE), torch.randint(0, 151936, (4,), device=DEVICE)
    scores, ranks = torch.empty(4, device=DEVICE), torch.empty(4, dtype=torch.int64, device=DEVICE)
    ids, values = torch.empty(4, 20, dtype=torch.int64, device=DEVICE), torch.empty(4, 20, device=DEVICE)
    penalized, history = torch.randn(151936, device=DEVICE), torch.randint(0, 1000, (3000,), device=DEVICE)

    def step() -> None:
        kernels.attention(q, cache, batch, 0.088, 0.0, out)
        kernels.top_logprobs(logits, chosen, scores, ranks, ids, values)
        kernels.penalize(penalized, history, history[:500], 1.0, 0.1, 0.1)

    graph = _captured(step)
    expected.copy_(out)
    before = [t.clone() for t in (scores, ranks, ids, values)]
    for buffer in (out, scores, ranks, ids, values):
        buffer.fill_(-7)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(before, (scores, ranks, ids, values), strict=True))
    best = logits.log_softmax(1).topk(20)
    assert torch.equal(ids, best.indices)
    torch.testing.assert_close(values, best.values, atol=1e-4, rtol=1e-4)
