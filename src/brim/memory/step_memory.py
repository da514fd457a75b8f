"""What a step needs on the device besides weights and KV: every static buffer by name and size. Owns `StepLimits` too.

The worker builds its buffers from these very tables, so what a plan computes is what a start allocates. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from brim.config.model_spec import ModelSpec
from brim.config.schema import MAX_LOGPROBS
from brim.memory.workspace import BufferSpec
from brim.units import ceil_div, round_up

DECODER_STAGES = 7
LOGITS_STAGE = DECODER_STAGES
LOGITS_BUFFER_BYTES = 32 << 20  # of float32 logits, where no wider stage leaves room for more
ROW_ALIGNMENT_BYTES = 16


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step the scheduler may ever form: sequences, tokens, positions a sequence can have."""

    max_num_seqs: int
    max_num_tokens: int
    max_model_len: int

    def with_(self, **changes: int) -> StepLimits:
        """A copy with other values."""
        return replace(self, **changes)


def decoder_widths(spec: ModelSpec) -> tuple[tuple[str, int, int, int], ...]:
    """(name, columns, first stage, last stage) of each temporary of one decoder layer.

    Stages: 0 norm, 1 qkv, 2 attention, 3 output projection, 4 gate and up, 5 activation (over the gate, so no buffer of its own
    is alive in the widest stages), 6 down, 7 logits. What the layers leave, "hidden", is still read while logits are made.
    """
    queries = spec.num_heads * spec.head_dim
    keys = spec.num_kv_heads * spec.head_dim
    return (
        ("residual", spec.hidden_size, 0, 6),
        ("hidden", spec.hidden_size, 0, LOGITS_STAGE),
        ("qkv", queries + 2 * keys, 1, 2),
        ("attention", queries, 2, 3),
        ("gate_up", 2 * spec.intermediate_size, 4, 6),
    )


def logit_rows(spec: ModelSpec, limits: StepLimits, element_bytes: int) -> int:
    """Rows of float32 logits held at once: all sequences where the widest stage of the layers leaves room, or 32 MiB do;
    else as many as fit, at least one.

    Example: Llama 3.1 8B, 256 sequences, steps of 8,192 tokens in bfloat16: gate_up alone is 448 MiB, and 256 rows take 125 MiB.
    """
    widths = decoder_widths(spec)
    alive = [sum(w for name, w, first, last in widths if first <= s <= last and name != "hidden") for s in range(DECODER_STAGES)]
    room_bytes = max(LOGITS_BUFFER_BYTES, limits.max_num_tokens * max(alive) * element_bytes)
    return max(1, min(limits.max_num_seqs, room_bytes // (4 * spec.vocab_size)))


def step_buffers(spec: ModelSpec, limits: StepLimits, element_bytes: int) -> list[BufferSpec]:
    """Temporaries of the largest step, by the stage between which they live; the logits come after the layers."""
    rows = limits.max_num_tokens
    layers = [BufferSpec(name, rows * width * element_bytes, first, last) for name, width, first, last in decoder_widths(spec)]
    logits_bytes = logit_rows(spec, limits, element_bytes) * spec.vocab_size * 4
    return [*layers, BufferSpec("logits", logits_bytes, LOGITS_STAGE, LOGITS_STAGE)]


def rotary_table_bytes(spec: ModelSpec, max_model_len: int) -> int:
    """float32 cos and sin of half the head for each position, once for each distinct rotary setting."""
    kinds = {spec.rope_full if kind == "full" else spec.rope_sliding for kind in spec.layer_kinds}
    return len(kinds) * max_model_len * spec.head_dim * 4


def input_arrays(limits: StepLimits, num_groups: int, block_size: int) -> dict[str, tuple[int, ...]]:
    """The input buffers of a step: name -> (bytes of an element, shape...)."""
    tokens, seqs = limits.max_num_tokens, limits.max_num_seqs
    blocks = ceil_div(limits.max_model_len, block_size)
    arrays: dict[str, tuple[int, ...]] = {
        "turn": (4, 2),
        "one_each": (4, seqs + 1),
        "row_numbers": (8, seqs),
        "query_start": (4, seqs + 1),
        "seq_lens": (4, seqs),
        "sample_rows": (8, seqs),
        "rows": (8, seqs),
        "sampled_rows": (8, seqs),
        "ids": (8, tokens),
        "positions": (8, tokens),
    }
    slots: dict[str, tuple[int, ...]] = {f"slots_{group}": (8, tokens) for group in range(num_groups)}
    tables: dict[str, tuple[int, ...]] = {f"tables_{group}": (4, seqs, blocks) for group in range(num_groups)}
    return arrays | slots | tables


def sampler_arrays(
    vocab_size: int, hidden_size: int, limits: StepLimits, element_bytes: int, rows: int
) -> dict[str, tuple[int, ...]]:
    """The sampler's buffers but the logits, of which `rows` are held at once: name -> (bytes of an element, shape...)."""
    seqs = limits.max_num_seqs
    return {
        "temperature": (4, seqs),
        "top_k": (4, seqs),
        "top_p": (4, seqs),
        "min_p": (4, seqs),
        "seed": (8, seqs),
        "position": (8, seqs),
        "ids": (8, seqs),
        "sums": (4, seqs),
        "last_ids": (8, seqs + 1),
        "hidden": (element_bytes, seqs, hidden_size),
        "chosen": (4, rows),
        "rank": (8, rows),
        "top_ids": (8, rows, MAX_LOGPROBS),
        "top_values": (4, rows, MAX_LOGPROBS),
        "targets": (8, rows),
        "row_copy": (4, 1, vocab_size),
        "history": (8, limits.max_model_len),
        "edits": (4, limits.max_model_len),
    }


def arrays_bytes(arrays: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of arrays in one run, each beginning at a multiple of 16."""
    return sum(round_up(math.prod(array), ROW_ALIGNMENT_BYTES) for array in arrays.values())
