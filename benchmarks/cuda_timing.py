"""What the GPU kernel benchmarks share: paged caches, graph timing. Owns no figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from model_shapes import LLAMA_3_1_8B, QWEN3_0_6B, ModelShape
from torch import Tensor

from brim.kernels.base import AttentionBatch

L2_BYTES = 120 << 20  # more than twice the cache: what is cycled through must exceed it
BLOCK_SIZE = 16


MODELS = {
    "llama-3.1-8b": LLAMA_3_1_8B,
    "qwen3-0.6b": QWEN3_0_6B,
}


def graph_ms(calls: Sequence[Callable[[], None]], replays: int = 7) -> float:
    """Median milliseconds of one call, all calls in one graph, replayed after one to warm up."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times) / len(calls)


def copies_for(num_bytes: int, least: int = 4, most: int = 64) -> int:
    """How many buffers of this size to cycle through so that none is still in the cache when its turn comes."""
    return max(least, min(most, -(-L2_BYTES // num_bytes)))


@dataclass
class PagedCase:
    """Layers of a paged cache with scattered blocks, a batch over it and the queries."""

    layers: list[Tensor]
    batch: AttentionBatch
    q: Tensor
    out: Tensor
    scale: float


def paged_case(
    shape: ModelShape, query_lens: list[int], seq_lens: list[int], layers: int = 32, device: str = "cuda"
) -> PagedCase:
    """bfloat16, random values; together the layers should exceed the cache. On "meta" nothing is held."""
    per_seq = [-(-n // BLOCK_SIZE) for n in seq_lens]
    total = sum(per_seq)
    size = (total, layers, 2, BLOCK_SIZE, shape.kv_heads, shape.head_dim)
    pool = torch.empty(size, dtype=torch.bfloat16, device=device).uniform_(-1, 1)
    order = torch.randperm(total, dtype=torch.int32).to(device)
    tables = torch.zeros(len(seq_lens), max(per_seq), dtype=torch.int32, device=device)
    used = 0
    for seq, blocks in enumerate(per_seq):
        tables[seq, :blocks] = order[used : used + blocks]
        used += blocks
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32, device=device)
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    slots = torch.arange(sum(query_lens), device=device)
    batch = AttentionBatch(tables, slots, starts, lens, len(seq_lens), max(query_lens), max(seq_lens), BLOCK_SIZE, 0)
    q = torch.randn(sum(query_lens), shape.heads * shape.head_dim, device=device).bfloat16()
    return PagedCase([pool[:, i] for i in range(layers)], batch, q, torch.empty_like(q), shape.head_dim**-0.5)


def causal_flops(shape: ModelShape, tokens: int) -> float:
    """Operations of causal attention of one layer over `tokens` new tokens: two products over half a square."""
    return 4.0 * shape.heads * shape.head_dim * tokens * (tokens + 1) / 2
