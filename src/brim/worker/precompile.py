"""Compiling kernels before they are needed. Owns when it happens: from the plan on, beside the loading of weights, until warm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from brim.config.model_spec import ModelSpec
from brim.kernels.base import Kernels
from brim.kernels.rehearsal import CompileJob, CompileReport
from brim.memory.kv_layout import KVLayout
from brim.memory.step_memory import StepLimits
from brim.worker.variants import VariantStep, rehearse


@dataclass(frozen=True, slots=True)
class CompileAhead:
    """steps: to be run in warm, they load every kernel variant that serving can need. reason: why nothing is being compiled."""

    steps: tuple[VariantStep, ...] = ()
    job: CompileJob | None = None
    reason: str = ""

    def wait(self, told: Callable[[int, int], None] | None = None) -> CompileReport:
        """Before the first step runs; the processes are gone afterwards. told: see `CompileJob`."""
        if self.job is None:
            return CompileReport(0, 0, 0, 0.0, (self.reason,) if self.reason else ())
        return self.job.wait(told)

    def close(self) -> None:
        """On every way out of a start; ends the processes where they still run."""
        if self.job is not None:
            self.job.close()


def compile_ahead(kernels: Kernels, spec: ModelSpec, limits: StepLimits, layout: KVLayout, dtype: torch.dtype) -> CompileAhead:
    """Rehearse every step and begin to compile what they need; nothing where these kernels compile nothing while they run.

    Never raises: what is not compiled ahead is compiled when it is first called."""
    try:
        rehearsal = kernels.rehearsal()
        if rehearsal is None:
            return CompileAhead()
        steps = rehearse(rehearsal, spec, limits, layout, dtype)
        return CompileAhead(steps, rehearsal.compile())
    except Exception as error:  # whatever a compiler or an operating system raises
        return CompileAhead(reason=f"{type(error).__name__}: {error}")
