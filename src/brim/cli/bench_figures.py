"""From what was measured to figures with their physical limits. Owns the arithmetic of bytes and operations; measures nothing.

A limit is what the device's own measured bandwidth and products allow for the bytes that must move and the operations that must
be done, everything else being free. Worked example: 15.0 GB of weights at 3.03 TB/s are 4.95 ms; a step of 6.1 ms has 81 %.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from brim.cli.measure import SHORT_DECODE_TOKENS, kv_read_bytes, weight_read_bytes
from brim.cli.workloads import workload_named
from brim.config.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Figure:
    """One row. limit and limit_share None: physics sets none. flops, moved_bytes: of what took `seconds`, for a roofline."""

    name: str
    value: float
    unit: str
    limit: float | None = None
    limit_share: float | None = None
    limit_is: str = ""
    flops: float | None = None
    moved_bytes: float | None = None
    seconds: float | None = None


def time_figure(name: str, ms: float, limit_ms: float, limit_is: str, flops: float, moved_bytes: float) -> Figure:
    """Less is better: the share is limit / value."""
    return Figure(name, ms, "ms", limit_ms, limit_ms / ms if ms > 0 else None, limit_is, flops, moved_bytes, ms / 1000)


def linear_shapes(spec: ModelSpec) -> list[tuple[int, int, int]]:
    """(outputs, inputs, how many) of the matrix products of one token, the one over the vocabulary last."""
    attended = spec.num_heads * spec.head_dim
    return [
        (attended + 2 * spec.num_kv_heads * spec.head_dim, spec.hidden_size, spec.num_layers),
        (spec.hidden_size, attended, spec.num_layers),
        (2 * spec.intermediate_size, spec.hidden_size, spec.num_layers),
        (spec.hidden_size, spec.intermediate_size, spec.num_layers),
        (spec.vocab_size, spec.hidden_size, 1),
    ]


class Work:
    """Bytes and operations of a model's steps. info and kv: parts of `LLM.info` and `LLM.memory()`."""

    def __init__(self, spec: ModelSpec, info: Mapping[str, Any], kv: Mapping[str, Any]) -> None:
        self._spec = spec
        self._kv = dict(kv)
        self.weight_bytes = weight_read_bytes(dict(info))
        shapes = linear_shapes(spec)
        self._head_flops = 2 * shapes[-1][0] * shapes[-1][1]
        self._layers_flops = 2 * sum(outputs * inputs * count for outputs, inputs, count in shapes[:-1])

    def decode_bytes(self, batch_size: int, first_position: int, num_steps: int) -> int:
        """Of one step: all weights once, and each sequence's cached keys and values, the mean over num_steps."""
        return self.weight_bytes + batch_size * kv_read_bytes(self._kv, first_position, num_steps)

    def decode_flops(self, batch_size: int, position: int) -> float:
        """Of one step at this context length."""
        return batch_size * (self._layers_flops + self._head_flops + self._pair_flops(position))

    def prefill_flops(self, num_tokens: int) -> float:
        """Of a prompt: every layer for every token, causal attention, and the vocabulary once."""
        half = sum(self._pairs(kind == "sliding", num_tokens) for kind in self._spec.layer_kinds)
        return self._layers_flops * num_tokens + self._head_flops + 4.0 * self._spec.num_heads * self._spec.head_dim * half

    def workload_cost(self, lengths: Iterable[tuple[int, int]]) -> tuple[float, float, float]:
        """(bytes of decoding, operations of decoding, operations of prefilling) of requests of (prompt, new) tokens that all
        start at once: as many steps as the longest takes, and keys and values as each sequence grows."""
        pairs = list(lengths)
        cached = sum(kv_read_bytes(self._kv, prompt, new) * new for prompt, new in pairs)
        decoding = sum(self.decode_flops(1, prompt + new // 2) * new for prompt, new in pairs)
        return self.weight_bytes * max(n for _, n in pairs) + cached, decoding, sum(self.prefill_flops(p) for p, _ in pairs)

    def _pair_flops(self, position: int) -> float:
        seen = sum(min(position, self._spec.sliding_window) if kind == "sliding" else position for kind in self._spec.layer_kinds)
        return 4.0 * self._spec.num_heads * self._spec.head_dim * seen

    def _pairs(self, slides: bool, num_tokens: int) -> float:
        """Query and key pairs of one causal layer."""
        window = min(num_tokens, self._spec.sliding_window) if slides else num_tokens
        return window * (window + 1) / 2 + (num_tokens - window) * window


def figures_of(spec: ModelSpec, found: Mapping[str, Any], limits: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """All rows of one model. found: part -> what was measured, as `bench_suite` collects it; parts that failed give no rows."""
    work = Work(spec, found["info"], found["kv"]) if "info" in found else None
    rows = [*_start_rows(found), *_memory_rows(found)]
    if work is not None:
        rows = [*_decode_rows(work, found, limits, name), *_prompt_rows(work, found, limits, spec), *rows]
    return [asdict(row) for row in rows]


def _done(found: Mapping[str, Any], part: str) -> dict[str, Any] | None:
    result = found.get(part)
    return result if result and "failed" not in result else None


def _decode_rows(work: Work, found: Mapping[str, Any], limits: Mapping[str, Any], name: str) -> Iterator[Figure]:
    bandwidth = limits["bandwidth_bytes_per_s"]
    linears = limits.get("linears_ms", {}).get(name, {})
    if decode := _done(found, "decode"):
        first = decode["input_len"] + SHORT_DECODE_TOKENS
        for size, ms in decode["ms_per_token"].items():
            moved = work.decode_bytes(int(size), first, decode["output_len"])
            alone = f"; the matrix products alone, one graph: {linears[size]:.2f} ms" if size in linears else ""
            flops = work.decode_flops(int(size), first + decode["output_len"] // 2)
            limit_is = f"weights and KV, {moved / 1e9:.2f} GB{alone}"
            yield time_figure(f"decode, batch {size}", ms, moved / bandwidth * 1000, limit_is, flops, moved)
    if long := _done(found, "long"):
        size, length = long["batch_size"], long["input_len"]
        moved = work.decode_bytes(size, length, long["output_len"])
        label, limit_is = f"decode, batch {size} at {length:,}", f"weights and KV, {moved / 1e9:.2f} GB"
        yield time_figure(label, long["ms_per_token"], moved / bandwidth * 1000, limit_is, work.decode_flops(size, length), moved)
    if beside := _done(found, "beside"):
        quiet, ms = beside["undisturbed_ms_per_token"], beside["ms_per_token"]
        yield Figure(f"decode beside a prompt of {beside['input_len']:,}", ms, "ms", quiet, quiet / ms, "the same, undisturbed")


def _prompt_rows(work: Work, found: Mapping[str, Any], limits: Mapping[str, Any], spec: ModelSpec) -> Iterator[Figure]:
    products = limits.get("matmul_flops")
    if (prefill := _done(found, "prefill")) and products:
        flops = work.prefill_flops(prefill["input_len"])
        limit_is = f"{flops / 1e12:.1f} TFLOP of products and attention"
        label, limit_ms = f"prefill of {prefill['input_len']:,}", flops / products * 1000
        yield time_figure(label, prefill["ms"], limit_ms, limit_is, flops, work.weight_bytes)
    offline, served = _done(found, "workload"), _done(found, "server")
    if offline and products:
        load = workload_named(offline["name"], spec.vocab_size, offline["num_seqs"])
        lengths = [(len(prompt), new) for prompt, new in zip(load.prompts, load.num_new_tokens, strict=True)]
        moved, decoding, prefilling = work.workload_cost(lengths)
        limit = load.num_output_tokens / (moved / limits["bandwidth_bytes_per_s"] + prefilling / products)
        rate = offline["tokens_per_s"]
        limit_is = f"{moved / 1e12:.2f} TB to decode, {prefilling / 1e12:.0f} TFLOP to prefill"
        flops, seconds = decoding + prefilling, offline["seconds"]
        yield Figure(f"workload {load.name}", rate, "tokens/s", limit, rate / limit, limit_is, flops, moved, seconds)
    if served:
        rate, whole = served["tokens_per_s"], offline["tokens_per_s"] if offline else None
        label = f"the same, {served['num_clients']} clients over HTTP"
        yield Figure(label, rate, "tokens/s", whole, rate / whole if whole else None, "offline" if whole else "")


def _start_rows(found: Mapping[str, Any]) -> Iterator[Figure]:
    for part, label in (("start_cold", "start to ready, nothing cached"), ("start_second", "start to ready, second start")):
        if start := _done(found, part):
            yield Figure(label, start["ready_s"], "s")
    if served := _done(found, "server"):
        yield Figure("server: start to ready", served["ready_s"], "s")


def _memory_rows(found: Mapping[str, Any]) -> Iterator[Figure]:
    if "info" in found:
        yield Figure("KV cache", found["info"]["kv_tokens"], "tokens")
    for part, memory in found.get("memory", {}).items():
        kind = "resident_bytes" if found["host_memory"] else "free_bytes"
        move = memory[kind]["most"] - memory[kind]["least"]
        what = "held" if found["host_memory"] else "free"
        yield Figure(f"{what} memory moved, {part}", move, "bytes")
