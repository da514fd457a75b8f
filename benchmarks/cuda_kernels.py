"""Speed of the Triton kernels on a GPU at the shapes of two models, beside the limits and the peers of the same run.

    python benchmarks/cuda_kernels.py [--parts limits decode prefill rows sampling linears memory] [--json FILE]

Every time is the median of graph replays; what is read is cycled through so that it does not come from the cache.
"""
# ruff: noqa: B023 (every call is timed before its loop moves on)

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from cuda_timing import MODELS, ModelShape, causal_flops, copies_for, graph_ms, paged_case
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from brim.kernels.base import SamplingBatch
from brim.kernels.triton.kernels import TritonKernels
from brim.kernels.triton.scratch import KernelLimits

Record = dict[str, Any]
PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
BF16 = torch.bfloat16


def kernels_for(shape: ModelShape) -> TritonKernels:
    """The kernels as an engine of 256 sequences makes them."""
    return TritonKernels("cuda", KernelLimits(256, shape.heads, shape.kv_heads, shape.head_dim, shape.vocab))


def limits() -> list[Record]:
    """What the device itself reaches: copy bandwidth and a large product."""
    a, b = (torch.randn(1 << 30, device="cuda").to(BF16) for _ in range(2))
    copy = graph_ms([lambda: torch.add(a, 1, out=b)] * 3)
    x, y, z = (torch.randn(8192, 8192, device="cuda").to(BF16) for _ in range(3))
    product = graph_ms([lambda: torch.mm(x, y, out=z)] * 3)
    return [{"copy_gb_s": 2 * a.nbytes / copy / 1e6, "product_tflops": 2 * 8192**3 / product / 1e9}]


def decode(shape: ModelShape) -> list[Record]:
    """Decode attention: microseconds a layer, and KV bytes per second."""
    kernels, records = kernels_for(shape), []
    for batch in (1, 8, 64):
        for context in (128, 1024, 4096, 8192, 32768):
            layer_bytes = batch * context * 2 * shape.kv_heads * shape.head_dim * 2
            case = paged_case(shape, [1] * batch, [context] * batch, layers=max(2, min(32, 4 * 10**9 // layer_bytes)))
            ms = graph_ms(
                [
                    lambda kv=kv, case=case: kernels.attention(case.q, kv, case.batch, case.scale, 0.0, case.out)
                    for kv in case.layers
                ]
            )
            records.append({"batch": batch, "context": context, "us": ms * 1000, "gb_s": layer_bytes / ms / 1e6})
            del case
            torch.cuda.empty_cache()
    uneven = [32768] + [256] * 63
    case = paged_case(shape, [1] * 64, uneven, layers=16)
    ms = graph_ms([lambda kv=kv: kernels.attention(case.q, kv, case.batch, case.scale, 0.0, case.out) for kv in case.layers])
    num_bytes = sum(uneven) * 2 * shape.kv_heads * shape.head_dim * 2
    records.append({"batch": 64, "context": "one of 32768, 63 of 256", "us": ms * 1000, "gb_s": num_bytes / ms / 1e6})
    return records


def prefill(shape: ModelShape) -> list[Record]:
    """Prefill attention of one and of several prompts, beside torch's attention over plain tensors."""
    kernels, records = kernels_for(shape), []
    for query_lens, seq_lens in (([8000], [8000]), ([2048] * 4, [2048] * 4), ([2048], [30000]), ([512] + [1] * 63, [8192] * 64)):
        case = paged_case(shape, query_lens, seq_lens, layers=4)
        ms = graph_ms([lambda kv=kv, c=case: kernels.attention(c.q, kv, c.batch, c.scale, 0.0, c.out) for kv in case.layers])
        pairs = sum(n * (s - n) + n * (n + 1) / 2 for n, s in zip(query_lens, seq_lens, strict=True))
        record = {"query_lens": str(query_lens)[:40], "context": seq_lens[0], "us": ms * 1000}
        record["tflops"] = 4.0 * shape.heads * shape.head_dim * pairs / ms / 1e9
        if query_lens == [8000]:
            record |= {f"{name}_tflops": _peer(shape, 8000, backend) for name, backend in PEERS.items()}
        records.append(record)
    return records


def _peer(shape: ModelShape, tokens: int, backend: SDPBackend) -> float | str:
    q = torch.randn(1, shape.heads, tokens, shape.head_dim, device="cuda").to(BF16)
    k, v = (torch.randn(1, shape.kv_heads, tokens, shape.head_dim, device="cuda").to(BF16) for _ in range(2))
    attend = torch.nn.functional.scaled_dot_product_attention

    def call() -> None:
        attend(q, k, v, is_causal=True, enable_gqa=True)

    try:
        with sdpa_kernel(backend):
            return causal_flops(shape, tokens) / graph_ms([call] * 2) / 1e9
    except RuntimeError as error:
        return str(error)[:80]


def rows(shape: ModelShape) -> list[Record]:
    """The kernels that make one pass over the rows of a step."""
    kernels, records = kernels_for(shape), []
    width, heads, kv, dim = shape.hidden, shape.heads, shape.kv_heads, shape.head_dim
    norm, head_norm = torch.ones(width, device="cuda"), torch.ones(dim, device="cuda")
    cos_sin = torch.randn(8192, dim, device="cuda")
    for tokens in (1, 64, 8000):
        count = copies_for(tokens * width * 4, most=32)
        hidden, residual = ([_noise(tokens, width) for _ in range(count)] for _ in range(2))
        gate_up, act = [_noise(tokens, 2 * shape.intermediate) for _ in range(4)], _noise(tokens, shape.intermediate)
        qkv = [_noise(tokens, (heads + 2 * kv) * dim) for _ in range(4)]
        case = paged_case(shape, [tokens], [tokens], layers=4)
        positions = torch.arange(tokens, device="cuda")
        work: dict[str, tuple[list[Callable[[], None]], float]] = {
            "add_rms_norm": (
                [lambda x=x, r=r: kernels.add_rms_norm(x, r, norm, 1e-5, x) for x, r in zip(hidden, residual, strict=True)],
                tokens * width * 8,
            ),
            "gated_activation": ([lambda g=g: kernels.gated_activation(g, act, "silu") for g in gate_up], act.nbytes * 3),
            "rope_and_cache": (
                [
                    lambda x=x, c=c: kernels.rope_and_cache(
                        x, positions, cos_sin, c, case.batch.slot_mapping, heads, head_norm, head_norm, 1e-6
                    )
                    for x, c in zip(qkv, case.layers, strict=True)
                ],
                qkv[0].nbytes * 2 + tokens * dim * 4,
            ),
        }
        for name, (calls, num_bytes) in work.items():
            ms = graph_ms(calls * max(1, 32 // len(calls)))
            records.append({"kernel": name, "tokens": tokens, "us": ms * 1000, "gb_s": num_bytes / ms / 1e6})
    return records


def _noise(*size: int) -> Tensor:
    return torch.randn(*size, device="cuda").to(BF16)


def sampling(shape: ModelShape) -> list[Record]:
    """Sampling from full rows of logits, by what the rows ask for."""
    kernels, records = kernels_for(shape), []
    for count in (1, 8, 64):
        logits, ids = torch.randn(count, shape.vocab, device="cuda") * 2, torch.zeros(count, dtype=torch.int64, device="cuda")
        for name, (top_k, top_p) in {
            "greedy": (0, 1),
            "temperature": (0, 1),
            "top_p": (0, 0.9),
            "top_k_top_p": (40, 0.9),
        }.items():
            fill = {"device": "cuda"}
            batch = SamplingBatch(
                torch.full((count,), 0.6, **fill),
                torch.full((count,), top_k, dtype=torch.int32, **fill),
                torch.full((count,), float(top_p), **fill),
                torch.zeros(count, **fill),
                torch.arange(count, **fill),
                torch.arange(count, **fill),
                name == "greedy",
            )
            ms = graph_ms([lambda logits=logits, batch=batch, ids=ids: kernels.sample(logits, batch, ids)] * 4)
            records.append({"rows": count, "settings": name, "us": ms * 1000})
    return records


def linears(shape: ModelShape) -> list[Record]:
    """All matrix products of a step, LM head included, in one graph: ours and the matrix library's own."""
    kernels, records = kernels_for(shape), []
    sizes = [(name, size) for _ in range(shape.layers) for name, size in shape.linears().items()]
    weights = [kernels.new_linear(*size, BF16) for _, size in sizes]
    head = kernels.new_linear(shape.vocab, shape.hidden, BF16)
    for weight in (*weights, head):
        weight.storage.uniform_(-0.02, 0.02)  # type: ignore[attr-defined]
    num_bytes = sum(weight.num_bytes for weight in (*weights, head))
    for count in (1, 8, 16, 64, 256):
        inputs = {n: _noise(count, n) for n in {weight.in_features for weight in (*weights, head)}}
        outputs = {n: _noise(count, n) for n in {weight.out_features for weight in weights}}
        logits = torch.empty(count, shape.vocab, device="cuda")
        record: Record = {"rows": count}
        for label in ("ours", "library"):

            def product(weight: Any, out: Tensor, label: str = label, inputs: dict[int, Tensor] = inputs) -> None:
                x = inputs[weight.in_features]
                if label == "ours":
                    kernels.linear(x, weight, out)
                elif out.dtype == BF16:
                    torch.mm(x, weight.storage.t(), out=out)
                else:
                    torch.mm(x, weight.storage.t(), out_dtype=torch.float32, out=out)

            calls = [lambda w=w, o=outputs[w.out_features], p=product: p(w, o) for w in weights]
            calls.append(lambda p=product, logits=logits: p(head, logits))
            record[f"{label}_ms"] = graph_ms(calls) * len(calls)
        records.append(record | {"ours_gb_s": num_bytes / record["ours_ms"] / 1e6})
    return records


def memory(shape: ModelShape) -> list[Record]:
    """What the matrix library takes at its first product, and the scratch memory of the kernels."""
    free, taken = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
    kernels = kernels_for(shape)
    made = torch.cuda.memory_allocated() - taken
    weight, x = kernels.new_linear(4096, 4096, BF16), _noise(8, 4096)
    out, wide = _noise(8, 4096), torch.empty(8, 4096, device="cuda")
    steps: list[Record] = [{"scratch_bytes": kernels.scratch_bytes, "allocated_bytes": made, "free_change": 0}]
    side = torch.cuda.Stream()
    for name, stream in (("current stream", torch.cuda.current_stream()), ("another stream", side)):
        before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
        with torch.cuda.stream(stream):
            kernels.linear(x, weight, out)
            kernels.linear(x, weight, wide)
        torch.cuda.synchronize()
        change = {"workspace_bytes": torch.cuda.memory_allocated() - before, "device_bytes": free - torch.cuda.mem_get_info()[0]}
        steps.append({"first products on": name} | change)
    return steps


PARTS = {"memory": memory, "decode": decode, "prefill": prefill, "rows": rows, "sampling": sampling, "linears": linears}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=[*PARTS, "limits"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.cuda.get_device_properties(0)
    record: Record = {
        "device": device.name,
        "multiprocessors": device.multi_processor_count,
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()},
        "command": " ".join(["python", "benchmarks/cuda_kernels.py", *sys.argv[1:]]),
    }
    for part in args.parts:
        for name, shape in MODELS.items():
            if part == "limits":
                record["limits"] = limits()
                break
            record.setdefault(part, {})[name] = PARTS[part](shape)
            torch.cuda.empty_cache()
            print(f"== {part} {name}")
            for line in record[part][name]:
                print(
                    "  ", {key: round(value, 2) if isinstance(value, float) else value for key, value in line.items()}, flush=True
                )
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n")
    print(record.get("limits"))


if __name__ == "__main__":
    main()
