"""Which of several kernels that give the same result are used. Owns the settings and the one in force.

Chosen by `benchmarks/cuda_tuning.py` on an H100 (docs/log.md). A choice enters which variants exist, never what they compute.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """dependent_launch: kernels start before the ones ahead of them end, on devices that can (`dependent`). fused_row: steps of
    one token take our own products with norm, activation and residual folded in (`skinny`). hopper: on the chip that they are
    written for, prompts take `hopper_attention`, and products of few rows are our own: `hopper_product` where the result is
    narrow, else `skinny`. split_norm: with both of these, norms of several rows in bfloat16 are done by the products around them,
    where the residual is narrow too."""

    dependent_launch: bool = False
    fused_row: bool = False
    hopper: bool = False
    split_norm: bool = False


CHOSEN = KernelChoice(dependent_launch=True, fused_row=True, hopper=True, split_norm=True)
