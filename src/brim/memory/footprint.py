"""What a start takes apart from KV, before any weight is read. Owns `StepLimits` and `Footprint`. Torch-free.

The worker that knows its model and buffers exactly builds the Footprint from their own arithmetic (computed lines);
`predicted_footprint` does the same from the spec alone, for `brim plan` on a machine that has neither weights nor device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from brim.config.model_spec import ModelSpec
from brim.memory.ledger import KnownBy, LedgerLine
from brim.memory.workspace import BufferSpec, plan_workspace
from brim.units import ceil_div


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step the scheduler may ever form: sequences, tokens, positions a sequence can have."""

    max_num_seqs: int
    max_num_tokens: int
    max_model_len: int

    def with_(self, **changes: int) -> StepLimits:
        """A copy with other values."""
        return replace(self, **changes)


LinesFor = Callable[[StepLimits], Sequence[LedgerLine]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Ledger lines that do not depend on the limits, and a function for those that do (tables, buffers, workspace).

    load_transient_bytes: the most that loading holds beyond the weights, given back before KV is committed; it happens
    at another time than steps, so it is compared with the cap on its own and never added to the workspace.
    The function must be monotone: larger limits never take fewer bytes.
    """

    fixed: tuple[LedgerLine, ...]
    lines_for: LinesFor
    load_transient_bytes: int = 0

    def lines(self, limits: StepLimits) -> tuple[LedgerLine, ...]:
        """Every line but KV."""
        return (*self.fixed, *self.lines_for(limits))

    def held_bytes(self, limits: StepLimits) -> int:
        """Their sum."""
        return sum(line.num_bytes for line in self.lines(limits))

    @property
    def fixed_floor_bytes(self) -> int:
        """What no setting makes smaller."""
        return sum(line.num_bytes for line in self.fixed)

    @property
    def load_peak_bytes(self) -> int:
        """The most held while weights are read."""
        return self.fixed_floor_bytes + self.load_transient_bytes


def fixed_lines(
    *, context_bytes: int, weight_bytes: int, context_known_by: KnownBy = "measured", library_bytes: int = 0
) -> tuple[LedgerLine, ...]:
    """The lines that no limit changes. library_bytes: what kernels and thread pools take when first used."""
    lines = [
        LedgerLine("context", "runtime and libraries", context_bytes, context_known_by),
        LedgerLine("weights", "model", weight_bytes, "computed"),
    ]
    if library_bytes:
        lines.append(LedgerLine("activations", "kernel libraries", library_bytes, "predicted"))
    return tuple(lines)


def decoder_buffers(spec: ModelSpec, num_tokens: int, element_bytes: int) -> list[BufferSpec]:
    """Temporaries of one decoder layer over num_tokens rows, by the stage between which they live.

    Stages: 0 norm, 1 qkv, 2 attention, 3 output projection, 4 gate and up, 5 activation (over the gate), 6 down.
    """
    queries = spec.num_heads * spec.head_dim
    keys = spec.num_kv_heads * spec.head_dim
    widths = (
        ("residual", spec.hidden_size, 0, 6),
        ("hidden", spec.hidden_size, 0, 6),
        ("qkv", queries + 2 * keys, 1, 2),
        ("attention", queries, 2, 3),
        ("gate_up", 2 * spec.intermediate_size, 4, 6),
    )
    return [BufferSpec(name, num_tokens * width * element_bytes, first, last) for name, width, first, last in widths]


def rotary_table_bytes(spec: ModelSpec, max_model_len: int) -> int:
    """float32 cos and sin of half the head for each position, once for each distinct rotary setting."""
    kinds = {spec.rope_full if kind == "full" else spec.rope_sliding for kind in spec.layer_kinds}
    return len(kinds) * max_model_len * spec.head_dim * 4


def input_bytes(limits: StepLimits, num_groups: int, block_size: int) -> int:
    """Ids, positions, slots and block tables of the largest step."""
    tokens, seqs = limits.max_num_tokens, limits.max_num_seqs
    blocks = ceil_div(limits.max_model_len, block_size)
    return tokens * 16 + seqs * 16 + 4 + num_groups * (tokens * 8 + seqs * blocks * 4)


def sampler_bytes(spec: ModelSpec, max_num_seqs: int, element_bytes: int, logits_limit_bytes: int = 32 << 20) -> int:
    """float32 logits of as many rows as fit in the limit (at least one), and the hidden rows and parameters of all."""
    rows = max(1, min(max_num_seqs, logits_limit_bytes // (4 * spec.vocab_size)))
    return rows * spec.vocab_size * 4 + max_num_seqs * (spec.hidden_size * element_bytes + 48)


def predicted_footprint(
    spec: ModelSpec, *, context_bytes: int, element_bytes: int, block_size: int, weight_bytes: int | None = None
) -> Footprint:
    """The footprint from the spec alone; weights are num_parameters elements where their bytes are not given.

    Worked example: docs/memory.md (Gemma 3 270M in bfloat16: 536,196,352 bytes of weights).
    """
    weights = spec.num_parameters * element_bytes if weight_bytes is None else weight_bytes
    num_groups = len(set(spec.layer_kinds))

    def lines_for(limits: StepLimits) -> list[LedgerLine]:
        workspace = plan_workspace(decoder_buffers(spec, limits.max_num_tokens, element_bytes))
        return [
            LedgerLine("buffers", "rotary tables", rotary_table_bytes(spec, limits.max_model_len), "predicted"),
            LedgerLine("buffers", "step inputs", input_bytes(limits, num_groups, block_size), "predicted"),
            LedgerLine("buffers", "sampler", sampler_bytes(spec, limits.max_num_seqs, element_bytes), "predicted"),
            LedgerLine("workspace", "step workspace", workspace.num_bytes, "predicted"),
        ]

    fixed = fixed_lines(context_bytes=context_bytes, weight_bytes=weights, context_known_by="predicted")
    return Footprint(fixed=fixed, lines_for=lines_for)
