"""A footprint from a spec alone, for tests of the planner: no kernels, no layouts, weights as plain elements."""

from __future__ import annotations

from brim.config.model_spec import ModelSpec
from brim.memory.footprint import Footprint, fixed_lines
from brim.memory.ledger import LedgerLine
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


def spec_footprint(
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
