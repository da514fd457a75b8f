"""Which of several kernels that give the same result are used. Owns the settings and the one in force.

Chosen by `benchmarks/cuda_tuning.py` on an H100 (docs/log.md): our own products win at one row only, there by 10 % of a step (8B)
and 42 % (0.6B). A choice enters which variants exist, never what they compute.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """dependent_launch: kernels start before the ones ahead of them end, on devices that can (`dependent`). fused_rows: steps of
    at most so many tokens take our own products with norm, activation and residual folded in (`skinny`); 0: none.
    hopper_prefill: prompts take `hopper_attention` on the chip that it is written for."""

    dependent_launch: bool = False
    fused_rows: int = 0
    hopper_prefill: bool = False


CHOSEN = KernelChoice(dependent_launch=True, fused_rows=1, hopper_prefill=True)
