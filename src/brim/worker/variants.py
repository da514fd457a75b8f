"""Steps that together call every kernel variant any step can need. Owns which sizes tell steps apart, and rehearsing them.

A kernel's variants depend on a few classes of size: whether a sequence has one new token or more, how many the longest has,
tokens and sequences in all. `candidates` walks through every size at which such a class may end; rehearsed over tensors that
hold nothing, those that added no variant are dropped, so the list stays short whatever the kernels are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from brim.config.model_spec import ModelSpec
from brim.config.schema import MAX_LOGPROBS
from brim.kernels.base import AttentionBatch, FedStep, HostFeed, Kernels, SamplingBatch
from brim.kernels.rehearsal import Rehearsal
from brim.memory.kv_layout import KVGroup, KVLayout
from brim.memory.step_memory import StepLimits, logit_rows
from brim.models.base import StepTensors
from brim.models.decoder import DecoderModel
from brim.units import ceil_div

_TABLE_ROWS = 8  # of a rehearsed rotary table: its length enters no launch
_NUM_BLOCKS = 2


@dataclass(frozen=True, slots=True)
class VariantStep:
    """New tokens of each sequence, the shape that the step is padded to, and how rows are sampled.

    padded_tokens: at least the sum of query_lens; max_query_len: at least the longest, above it only as in captured steps.
    has_features: penalties over prompt and output, biases and log-probabilities are on.
    """

    query_lens: tuple[int, ...]
    padded_tokens: int
    max_query_len: int
    all_greedy: bool
    has_features: bool = False

    @property
    def num_tokens(self) -> int:
        """T without padding."""
        return sum(self.query_lens)


def candidates(limits: StepLimits, group: int) -> Iterator[VariantStep]:
    """Steps at and just above every size that kernels tell apart; group: query heads that share a KV head."""
    yield VariantStep((1,), 1, 1, all_greedy=False, has_features=True)
    yield VariantStep((1,), 1, 1, all_greedy=True)
    for size in _borders(limits.max_num_tokens, group):
        if size <= limits.max_num_seqs:
            yield VariantStep((1,) * size, size, 1, all_greedy=False)
        if size == 1:
            continue
        longest = min(size, limits.max_model_len)
        yield VariantStep((longest,), size, size, all_greedy=True)
        if limits.max_num_seqs > 1:
            yield VariantStep((longest - 1, 1) if longest > 1 else (1, 1), size, size, all_greedy=True)


def _borders(largest: int, group: int) -> list[int]:
    """Powers of two, also of (query, head) pairs, the sizes after them, and the largest; increasing."""
    powers = [1 << bit for bit in range(largest.bit_length() + 6) if 1 << bit <= largest * group]
    sizes = {largest, *(size for power in powers for base in (power, power // group) for size in (base, base + 1))}
    return sorted(size for size in sizes if 1 <= size <= largest)


def rehearse(
    rehearsal: Rehearsal, spec: ModelSpec, limits: StepLimits, layout: KVLayout, dtype: torch.dtype
) -> tuple[VariantStep, ...]:
    """Call the kernels for every candidate; those steps that needed a variant which none before them did."""
    model = RehearsedModel(rehearsal.kernels, spec, limits, layout, dtype, rehearsal.device)
    kept = []
    for step in candidates(limits, spec.num_heads // spec.num_kv_heads):
        before = rehearsal.num_variants
        model.run(step)
        if rehearsal.num_variants > before:
            kept.append(step)
    return tuple(kept)


class RehearsedModel:
    """One layer of each kind and the sampler's calls, over buffers laid out as the worker's, on a device that holds nothing."""

    def __init__(
        self, kernels: Kernels, spec: ModelSpec, limits: StepLimits, layout: KVLayout, dtype: torch.dtype, device: torch.device
    ) -> None:
        kinds = tuple(dict.fromkeys(spec.layer_kinds))
        self._spec = replace(spec, num_layers=len(kinds), layer_kinds=kinds)
        self._kernels, self._limits, self._layout, self._device = kernels, limits, layout, device
        self._model = DecoderModel(self._spec, kernels, dtype, _TABLE_ROWS, device)
        self._rows = logit_rows(spec, limits, dtype.itemsize)
        shapes = self._model.buffer_shapes()
        self._buffers = {shape.name: self._empty((limits.max_num_tokens, shape.width), shape.dtype) for shape in shapes}
        groups = {group.kind: group for group in layout.groups}
        self._caches = [self._cache(groups[kind], dtype) for kind in kinds]
        self._logits = self._empty((self._rows, spec.vocab_size), torch.float32)
        self._hidden = self._empty((limits.max_num_seqs, spec.hidden_size), dtype)

    def run(self, step: VariantStep) -> None:
        """All calls of one step."""
        sizes = (step.padded_tokens, len(step.query_lens), step.max_query_len)
        self.run_shape(*sizes, all_greedy=step.all_greedy, has_features=step.has_features)

    def run_shape(self, num_tokens: int, num_seqs: int, max_query_len: int, *, all_greedy: bool, has_features: bool) -> None:
        """All calls of a step of this shape, padded or not; every sequence is sampled."""
        limits = self._limits
        ids, rows = self._int64(num_tokens), self._int64(num_seqs)
        last_ids = self._int64(limits.max_num_seqs + 1)
        if max_query_len == 1:
            self._feed(num_seqs)
        self._kernels.resolve_ids(ids[:num_seqs], rows, last_ids)
        batches = [self._batch(group, num_tokens, num_seqs, max_query_len) for group in self._layout.groups]
        whole = StepTensors(ids, self._int64(num_tokens), batches, self._caches, self._buffers)
        hidden = self._model.forward(whole)
        self._model.segments[-1].run(replace(whole, wanted=rows))
        self._kernels.gather_rows(hidden, rows, self._hidden[:num_seqs])
        count = min(num_seqs, self._rows)
        logits = self._logits[:count]
        self._model.logits(self._hidden[:count], logits)
        if has_features:
            self._edit_and_score(logits)
        self._kernels.sample(logits, self._params(count, all_greedy), self._int64(count))
        self._kernels.remember_ids(self._int64(num_seqs), rows, last_ids)

    def _edit_and_score(self, logits: Tensor) -> None:
        history = self._int64(2)
        self._kernels.penalize(logits[0], history[:1], history[1:], 1.1, 0.1, 0.1)
        count = len(logits)
        best_ids, best = self._empty((count, MAX_LOGPROBS), torch.int64), self._empty((count, MAX_LOGPROBS), torch.float32)
        self._kernels.top_logprobs(
            logits, self._int64(count), self._empty((count,), torch.float32), self._int64(count), best_ids, best
        )

    def _feed(self, num_seqs: int) -> None:
        """Both ends of a captured decode step."""
        limits, rows = self._limits, self._int64(num_seqs)
        tables = tuple(self._tables() for _ in self._layout.groups)
        sampling = self._params(limits.max_num_seqs, all_greedy=False)
        long, floats = self._int64(limits.max_num_seqs)[None], sampling.temperature[None]
        feed = HostFeed(
            self._empty((2,), torch.int32), long, long, long, sampling.top_k[None], sampling.top_k[None], floats, floats, floats,
            tuple(table[None] for table in tables), long,
        )  # fmt: skip
        slots, used = (rows,) * len(tables), tuple(table[:num_seqs] for table in tables)
        sampling, lens = self._params(num_seqs, all_greedy=False), self._empty((num_seqs,), torch.int32)
        last_ids = self._int64(limits.max_num_seqs + 1)
        step = FedStep(rows, rows, rows, lens, slots, used, sampling, last_ids, self._layout.block_size)
        self._kernels.begin_decodes(feed, step)
        self._kernels.end_decodes(feed, step, self._hidden[:num_seqs], rows)

    def _tables(self) -> Tensor:
        limits = self._limits
        return self._empty((limits.max_num_seqs, ceil_div(limits.max_model_len, self._layout.block_size)), torch.int32)

    def _batch(self, group: KVGroup, num_tokens: int, num_seqs: int, max_query_len: int) -> AttentionBatch:
        return AttentionBatch(
            block_tables=self._tables()[:num_seqs],
            slot_mapping=self._int64(num_tokens),
            query_start=self._empty((num_seqs + 1,), torch.int32),
            seq_lens=self._empty((num_seqs,), torch.int32),
            num_seqs=num_seqs,
            max_query_len=max_query_len,
            max_seq_len=self._limits.max_model_len,
            block_size=self._layout.block_size,
            window=group.window,
        )

    def _params(self, count: int, all_greedy: bool) -> SamplingBatch:
        floats, ints = self._empty((count,), torch.float32), self._int64(count)
        return SamplingBatch(floats, self._empty((count,), torch.int32), floats, floats, ints, ints, all_greedy)

    def _cache(self, group: KVGroup, dtype: torch.dtype) -> Tensor:
        """See memory.arena.view: a block holds all layers of its group."""
        layout = self._layout
        shape = (_NUM_BLOCKS, 2, layout.block_size, layout.num_kv_heads, layout.head_dim)
        row = layout.num_kv_heads * layout.head_dim
        strides = (group.block_bytes // dtype.itemsize, layout.block_size * row, row, layout.head_dim, 1)
        return torch.empty_strided(shape, strides, dtype=dtype, device=self._device)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def _int64(self, count: int) -> Tensor:
        return self._empty((count,), torch.int64)
