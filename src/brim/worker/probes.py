"""The worst steps the scheduler can form, fabricated. Owns which steps measure and prove run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from brim.config.model_spec import ModelSpec
from brim.config.schema import MAX_LOGPROBS
from brim.engine.sampling_params import SamplingParams
from brim.memory.step_memory import StepLimits
from brim.worker.sampler import SampleRows, SpecialRow
from brim.worker.step_inputs import StepArrays, StepShape
from brim.worker.variants import VariantStep

_SPECIAL_ROWS = 8  # rows with every feature; each works through the same static buffers, one after the other


def worst_steps(
    limits: StepLimits, block_size: int, blocks: Sequence[int], vocab_size: int
) -> Iterator[tuple[str, StepArrays, SampleRows]]:
    """Name, arrays and sampling of each worst step: the largest prefill at the longest context, and the largest decode batch at
    the longest context with every sampling feature on. Block tables walk through all committed blocks but 0."""
    yield ("largest prefill", *_prefill(limits, block_size, blocks, vocab_size))
    yield ("largest decode batch", *_decode(limits, block_size, blocks, vocab_size))


def warm_steps(
    limits: StepLimits, block_size: int, blocks: Sequence[int], spec: ModelSpec, variants: Sequence[VariantStep]
) -> Iterator[tuple[StepArrays, SampleRows, StepShape | None]]:
    """One decoding sequence, sampled with every feature, and the steps that together need every kernel variant, with the shape
    that each is padded to."""
    one = StepLimits(1, 1, min(limits.max_model_len, block_size))
    width = -(-limits.max_model_len // block_size)
    yield *_decode(one, block_size, blocks, spec.vocab_size, width=width), None
    for variant in variants:
        shape = StepShape(variant.padded_tokens, len(variant.query_lens), variant.max_query_len, limits.max_model_len)
        yield *_mixed(variant, width, blocks, spec.vocab_size), shape


def _mixed(variant: VariantStep, width: int, blocks: Sequence[int], vocab_size: int) -> tuple[StepArrays, SampleRows]:
    """Sequences at their beginning, all of them sampled."""
    num_seqs = len(variant.query_lens)
    arrays = StepArrays(
        token_ids=np.arange(variant.num_tokens, dtype=np.int64) % vocab_size,
        query_lens=np.array(variant.query_lens, dtype=np.int32),
        start_positions=np.zeros(num_seqs, dtype=np.int32),
        block_tables=_tables(num_seqs, width, blocks),
        sample_indices=np.arange(num_seqs, dtype=np.int32),
    )
    rows = _rows(num_seqs, vocab_size, special=variant.has_features, num_known=1)
    if variant.all_greedy:
        rows = replace(rows, temperature=np.zeros(num_seqs, dtype=np.float32))
    return arrays, rows


def _tables(num_seqs: int, width: int, blocks: Sequence[int]) -> tuple[np.ndarray, ...]:
    count = num_seqs * width
    return tuple((np.arange(count) % max(1, n - 1) + min(1, n - 1)).astype(np.int32).reshape(num_seqs, width) for n in blocks)


def _prefill(limits: StepLimits, block_size: int, blocks: Sequence[int], vocab_size: int) -> tuple[StepArrays, SampleRows]:
    num_tokens = min(limits.max_num_tokens, limits.max_model_len)
    width = -(-limits.max_model_len // block_size)
    arrays = StepArrays(
        token_ids=np.arange(num_tokens, dtype=np.int64) % vocab_size,
        query_lens=np.array([num_tokens], dtype=np.int32),
        start_positions=np.array([limits.max_model_len - num_tokens], dtype=np.int32),
        block_tables=_tables(1, width, blocks),
        sample_indices=np.zeros(1, dtype=np.int32),
    )
    return arrays, _rows(1, vocab_size, special=False)


def _decode(
    limits: StepLimits, block_size: int, blocks: Sequence[int], vocab_size: int, width: int | None = None
) -> tuple[StepArrays, SampleRows]:
    num_seqs = limits.max_num_seqs
    width = width or -(-limits.max_model_len // block_size)
    arrays = StepArrays(
        token_ids=np.arange(num_seqs, dtype=np.int64) % vocab_size,
        query_lens=np.ones(num_seqs, dtype=np.int32),
        start_positions=np.full(num_seqs, limits.max_model_len - 1, dtype=np.int32),
        block_tables=_tables(num_seqs, width, blocks),
        sample_indices=np.arange(num_seqs, dtype=np.int32),
    )
    return arrays, _rows(num_seqs, vocab_size, special=True, num_known=min(32, limits.max_model_len // 2))


def _rows(num_rows: int, vocab_size: int, special: bool, num_known: int = 0) -> SampleRows:
    """num_known: tokens of the prompt, and of the output, that penalties look at."""
    params = SamplingParams(
        temperature=0.8,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={0: 1.0},
        logprobs=MAX_LOGPROBS,
        max_tokens=None,
    )
    history = np.arange(num_known, dtype=np.int64) % vocab_size
    return SampleRows(
        temperature=np.full(num_rows, params.temperature, dtype=np.float32),
        top_k=np.full(num_rows, params.top_k, dtype=np.int32),
        top_p=np.full(num_rows, params.top_p, dtype=np.float32),
        min_p=np.full(num_rows, params.min_p, dtype=np.float32),
        seed=np.arange(num_rows, dtype=np.int64),
        position=np.zeros(num_rows, dtype=np.int64),
        special=tuple(SpecialRow(i, params, history, history, (0,)) for i in range(min(num_rows, _SPECIAL_ROWS)))
        if special
        else (),
    )
