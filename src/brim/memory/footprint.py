"""What a start takes apart from KV, before any weight is read. Owns `Footprint`. Torch-free.

The worker that knows its model and buffers exactly builds the Footprint from their own arithmetic (computed lines);
`predicted_footprint` does the same from the spec alone, for `brim plan` on a machine that has neither weights nor device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from brim.config.model_spec import ModelSpec
from brim.memory.ledger import KnownBy, LedgerLine
from brim.memory.step_memory import (
    StepLimits,
    arrays_bytes,
    input_arrays,
    logit_rows,
    rotary_table_bytes,
    sampler_arrays,
    step_buffers,
)
from brim.memory.workspace import plan_workspace

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


def predicted_footprint(
    spec: ModelSpec, *, context_bytes: int, element_bytes: int, block_size: int, weight_bytes: int | None = None
) -> Footprint:
    """The footprint from the spec alone; weights are num_parameters elements where their bytes are not given.

    Worked example: docs/memory.md (Gemma 3 270M in bfloat16: 536,196,352 bytes of weights).
    """
    weights = spec.num_parameters * element_bytes if weight_bytes is None else weight_bytes
    num_groups = len(set(spec.layer_kinds))

    def lines_for(limits: StepLimits) -> list[LedgerLine]:
        workspace = plan_workspace(step_buffers(spec, limits, element_bytes))
        inputs = arrays_bytes(input_arrays(limits, num_groups, block_size))
        rows = logit_rows(spec, limits, element_bytes)
        sampler = arrays_bytes(sampler_arrays(spec.vocab_size, spec.hidden_size, limits, element_bytes, rows))
        return [
            LedgerLine("buffers", "rotary tables", rotary_table_bytes(spec, limits.max_model_len), "predicted"),
            LedgerLine("buffers", "step inputs", inputs, "predicted"),
            LedgerLine("buffers", "sampler", sampler, "predicted"),
            LedgerLine("workspace", "step workspace", workspace.num_bytes, "predicted"),
        ]

    fixed = fixed_lines(context_bytes=context_bytes, weight_bytes=weights, context_known_by="predicted")
    return Footprint(fixed=fixed, lines_for=lines_for)
