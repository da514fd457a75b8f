"""Kernels that only say what they would compile. Owns the contract between who forms steps and who compiles for them.

A backend that compiles kernels while it runs gives a `Rehearsal`: the same kernels over tensors that hold nothing. Whoever knows
the steps of a model calls them for each; the rehearsal keeps what a real run would have compiled, and other processes can
compile it while this one still reads weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from brim.kernels.base import Kernels


@dataclass(frozen=True, slots=True)
class CompileReport:
    """What became of a job. failures: why variants were not made; they are compiled when they are first called."""

    num_variants: int
    num_cached: int
    num_compiled: int
    duration_s: float
    failures: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """One line for people."""
        line = f"{self.num_variants} kernels: {self.num_cached} cached, {self.num_compiled} compiled in {self.duration_s:.1f} s"
        return f"{line}; {len(self.failures)} not compiled ahead: {self.failures[0]}" if self.failures else line


class CompileJob(Protocol):
    """Kernels being compiled by other processes."""

    def wait(self, told: Callable[[int, int], None] | None = None) -> CompileReport:
        """Wait until all is done or given up, and end the processes. Never raises for what they did.

        told: how many variants are there, of how many, now and then until then."""

    def close(self) -> None:
        """End the processes at once. May follow `wait`, and itself."""


class Rehearsal(Protocol):
    """Kernels whose calls run nothing."""

    @property
    def kernels(self) -> Kernels:
        """To be called with tensors on `device`."""

    @property
    def device(self) -> torch.device:
        """Where tensors take no memory."""

    @property
    def num_variants(self) -> int:
        """Kernel variants that the calls so far need."""

    def compile(self) -> CompileJob:
        """Begin to compile them in other processes."""
