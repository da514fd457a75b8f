"""What `cuda_tuning.py` tries: cases, each with candidates for the same work. Owns inputs, references and limits of each case.

A case is built twice: on the meta device, where its launches are only listed so that other processes can compile them, and on
the GPU, where they are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from cuda_timing import ModelShape, paged_case
from fresh_attention import fresh_attention_kernel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.tools.tensor_descriptor import TensorDescriptor

from brim.kernels.triton.attention import AttentionLauncher
from brim.kernels.triton.chip import Chip
from brim.kernels.triton.hopper_launch import HopperLauncher
from brim.kernels.triton.kernels import TritonKernels
from brim.kernels.triton.launch import Launch, depending
from brim.kernels.triton.scratch import KernelLimits, Scratch
from brim.kernels.triton.tiles import LOG2_E
from brim.kernels.triton.tuning import AttentionTile

BF16 = torch.bfloat16
BYTES_PER_S = 3.0e12  # what a copy reaches on an H100
OPERATIONS_PER_S = 798e12  # what a product of 8192^3 reaches there
CHIP = Chip(132, True, True, True)
Calls = list[Callable[[], None]]


@dataclass
class Candidate:
    """One way to do a case's work. calls: it, once for each copy of what is read; out: where the first leaves its result."""

    name: str
    calls: Calls
    out: Tensor | None = None
    is_today: bool = False
    setting: Any = None


@dataclass
class Case:
    """limit_ms: bytes or operations over what the device reaches. expected: the result of the first call, in float32.
    worst_error: how far a right result may be from it, over its largest value."""

    label: str
    limit_ms: float
    candidates: list[Candidate] = field(default_factory=list)
    expected: Tensor | None = None
    worst_error: float = 0.02


Build = Callable[[str, Launch], Case]


def noise(device: str, *size: int) -> Tensor:
    """bfloat16, standard normal; of no memory on meta."""
    return torch.empty(*size, dtype=BF16, device=device) if device == "meta" else torch.randn(*size, device=device).to(BF16)


def kernels_on(shape: ModelShape, device: str, launch: Launch) -> TritonKernels:
    """Today's kernels, as an engine of 256 sequences makes them."""
    limits = KernelLimits(256, shape.heads, shape.kv_heads, shape.head_dim, shape.vocab)
    return TritonKernels(device, limits, CHIP, launch)


# -- decode attention

DECODE = "16 2 5 4,32 2 5 4,32 2 3 4,64 2 3 4"
LOADS = {
    "1x264": [264],
    "8x264": [264] * 8,
    "64x264": [264] * 64,
    "146xW": [400 + 9 * i for i in range(146)],
    "256x1000": [1000] * 256,
    "16x32768": [32768] * 16,
}
MOST_PROGRAMS_PER_CORE = 4


def decode_cases(shape: ModelShape) -> Iterator[tuple[str, Build]]:
    """Decode attention at batches of short, of mixed and of long sequences."""
    for name, lengths in LOADS.items():
        yield f"decode {name}", lambda d, launch, n=name, lens=lengths: decode_case(shape, n, lens, d, launch)


def decode_case(shape: ModelShape, name: str, lengths: list[int], device: str, launch: Launch) -> Case:
    """Tiles and programs per core, each launched early and, for the one of today, also in order."""
    layer_bytes = sum(lengths) * 2 * shape.kv_heads * shape.head_dim * 2
    layers = max(2, min(24, 4 * 10**9 // layer_bytes))
    paged = paged_case(shape, [1] * len(lengths), lengths, layers, device)
    limits = KernelLimits(256, shape.heads, shape.kv_heads, shape.head_dim, 16)
    scratch = Scratch(limits, CHIP.num_cores * MOST_PROGRAMS_PER_CORE, torch.device(device))
    case = Case(f"decode {name}", layer_bytes / BYTES_PER_S * 1e3)
    for index, group in enumerate(DECODE.split(",")):
        keys, warps, stages, per_core = map(int, group.split())
        for early in (False, True):
            start = depending(launch) if early else launch
            run = AttentionLauncher(limits, scratch, 1, 0, start).launch_decode
            tile, parts = AttentionTile(16, keys, warps, stages), CHIP.num_cores * per_core // shape.kv_heads
            calls = [
                lambda kv=kv, r=run, t=tile, p=parts: r(paged.q, kv, paged.batch, paged.scale, 0.0, paged.out, t, p)
                for kv in paged.layers
            ]
            if early or not index:
                case.candidates.append(Candidate(f"{group}{' early' * early}", calls, paged.out, not (early or index)))
    return case


# -- attention of short chunks with long contexts

CHUNK = {
    24: "64 64 4 5 1,64 128 4 3 1,32 32 2 5 4,32 16 2 5 4,32 64 4 3 4,32 32 4 5 4,16 16 2 5 4",
    56: "128 64 8 5 1,64 64 4 5 2,64 128 4 3 1,32 32 2 5 4,32 16 2 5 4,32 64 4 3 4",
    120: "128 64 8 5 1,128 128 8 3 1,64 64 4 5 2,32 32 2 5 4,32 16 2 5 4",
}
CONTEXT = 16_000


def chunk_cases(shape: ModelShape) -> Iterator[tuple[str, Build]]:
    """A chunk beside eight sequences that decode."""
    for tokens in CHUNK:
        yield f"chunk of {tokens}", lambda d, launch, n=tokens: chunk_case(shape, n, d, launch)


def chunk_case(shape: ModelShape, tokens: int, device: str, launch: Launch) -> Case:
    """Tiles and programs per core, and the kernels for prompts."""
    lengths = [264] * 8 + [CONTEXT]
    paged = paged_case(shape, [1] * 8 + [tokens], lengths, 8, device)
    limits = KernelLimits(256, shape.heads, shape.kv_heads, shape.head_dim, 16)
    scratch = Scratch(limits, 2 * CHIP.num_cores, torch.device(device))
    moved = CONTEXT * 2 * shape.kv_heads * shape.head_dim * 2 / BYTES_PER_S
    limit_s = max(moved, 4.0 * shape.heads * shape.head_dim * tokens * CONTEXT / OPERATIONS_PER_S)
    case = Case(f"chunk of {tokens} at {CONTEXT}", limit_s * 1e3)
    run = AttentionLauncher(limits, scratch, 1, CHIP.num_cores, depending(launch))
    for group in CHUNK[tokens].split(","):
        *numbers, per_core = map(int, group.split())
        tile, parts = AttentionTile(*numbers), CHIP.num_cores * per_core // shape.kv_heads
        calls = [
            lambda kv=kv, t=tile, p=parts: run.launch_chunk(
                paged.q, kv, paged.batch, paged.scale, 0.0, paged.out, t, p, least_queries=2
            )
            for kv in paged.layers
        ]
        case.candidates.append(Candidate(group, calls, paged.out, not case.candidates))
    tile = AttentionTile(64 if tokens * shape.heads // shape.kv_heads <= 64 else 128, 64, 8, 3)
    calls = [
        lambda kv=kv: run.launch_prefill(paged.q, kv, paged.batch, paged.scale, 0.0, paged.out, tile, skip_decodes=True)
        for kv in paged.layers
    ]
    case.candidates.append(Candidate("by blocks", calls, paged.out))
    return case


# -- prefill attention

PREFILL = "128 64 8 3,128 128 8 2,128 64 8 5,64 64 4 3"
FRESH = "128 128 8 2,128 64 8 3,128 64 8 4,64 128 4 2"
PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def prefill_cases(shape: ModelShape, *, hopper: bool) -> Iterator[tuple[str, Build]]:
    """One prompt of 8,000 tokens, four of 2,048, and a chunk of 2,048 behind 28,000 earlier tokens."""
    for queries, lengths in (([8000], [8000]), ([2048] * 4, [2048] * 4), ([2048], [30048]), ([700, 1, 333], [900, 70, 333])):
        name = f"prefill {len(queries)}x{queries[0]} of {lengths[0]}"
        yield name, lambda d, launch, q=queries, n=lengths: prefill_case(shape, q, n, d, launch, hopper=hopper)


def prefill_case(shape: ModelShape, queries: list[int], lengths: list[int], device: str, launch: Launch, *, hopper: bool) -> Case:
    """Today's kernel and other tiles, or the kernel for Hopper; over fresh rows and by libraries where comparable."""
    paged = paged_case(shape, queries, lengths, 2, device)
    pairs = sum(n * (s - n) + n * (n + 1) / 2 for n, s in zip(queries, lengths, strict=True))
    operations = 4.0 * shape.heads * shape.head_dim * pairs
    case = Case(f"prefill {len(queries)}x{queries[0]} of {lengths[0]}", operations / OPERATIONS_PER_S * 1e3)
    limits = KernelLimits(256, shape.heads, shape.kv_heads, shape.head_dim, 16)
    run = AttentionLauncher(limits, Scratch(limits, CHIP.num_cores, torch.device(device)), 1, 0, launch)
    q, batch, scale = paged.q, paged.batch, paged.scale
    skips = 1 in queries
    for index, group in enumerate(PREFILL.split(",")):
        tile, out = AttentionTile(*map(int, group.split())), torch.zeros_like(q)
        calls = [
            lambda kv=kv, t=tile, o=out: run.launch_prefill(q, kv, batch, scale, 0.0, o, t, skip_decodes=skips)
            for kv in paged.layers
        ]
        case.candidates.append(Candidate(f"paged {group}", calls, out, not index))
    if hopper:
        case.candidates = case.candidates[:1] + list(hopper_candidates(paged, launch, skips=skips))
        if device != "meta":  # today's kernel is right: its tests say so
            case.candidates[0].calls[0]()
            torch.cuda.synchronize()
            case.expected = case.candidates[0].out.float()  # type: ignore[union-attr]
        return case
    if queries == lengths and len(queries) == 1:
        case.candidates += fresh_candidates(shape, queries[0], device, launch)
        if device != "meta":
            case.candidates += [peer(shape, queries[0], name, backend) for name, backend in PEERS.items()]
    return case


def hopper_candidates(paged: Any, launch: Launch, *, skips: bool) -> Iterator[Candidate]:
    """Tiles of the kernel for Hopper."""
    for keys, stages in ((128, 2), (64, 3), (64, 4)):
        run, out = HopperLauncher(launch, 256, AttentionTile(128, keys, 4, stages)), torch.zeros_like(paged.q)
        calls = [
            lambda kv=kv, r=run, o=out: r.launch(paged.q, kv, paged.batch, paged.scale, o, least_queries=2 if skips else 0)
            for kv in paged.layers
        ]
        yield Candidate(f"hopper {keys} s{stages}", calls, out)


def fresh_candidates(shape: ModelShape, tokens: int, device: str, launch: Launch) -> Iterator[Candidate]:
    """Over rows of q, k and v, by pointers and by bulk copies."""
    heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.head_dim
    qkv, width = noise(device, tokens, (heads + 2 * kv_heads) * dim), kv_heads * dim
    k, v = qkv[:, heads * dim :][:, :width], qkv[:, heads * dim + width :]
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    lens = torch.tensor([tokens], dtype=torch.int32, device=device)
    for bulk in (False, True):
        for group in FRESH.split(","):
            rows, keys, warps, stages = map(int, group.split())
            out = torch.empty(tokens, heads * dim, dtype=BF16, device=device)
            pair = [TensorDescriptor(t, [tokens, width], [qkv.stride(0), 1], [keys, dim]) if bulk else t for t in (k, v)]
            grid = ((tokens // rows + 1) * heads,)
            calls: Calls = [
                lambda g=grid, p=pair, o=out, r=rows, n=keys, w=warps, s=stages, b=bulk: launch(
                    fresh_attention_kernel, g, qkv, *p, o, starts, lens, 1.0, dim**-0.5 * LOG2_E, 1, qkv.stride(0),
                    qkv.stride(0), o.stride(0), SEQS_PAD=256, HEADS=heads, GROUP=heads // kv_heads, D=dim, ROWS=r, KEYS=n,
                    BULK=b, SOFTCAP=False, num_warps=w, num_stages=s,
                )
            ] * 2  # fmt: skip
            yield Candidate(f"fresh {group}{' bulk' * bulk}", calls)


def peer(shape: ModelShape, tokens: int, name: str, backend: SDPBackend) -> Candidate:
    """torch's attention over plain tensors."""
    q = noise("cuda", 1, shape.heads, tokens, shape.head_dim)
    k, v = (noise("cuda", 1, shape.kv_heads, tokens, shape.head_dim) for _ in range(2))

    def call() -> None:
        with sdpa_kernel(backend):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return Candidate(name, [call] * 2)
