"""Decode steps recorded once and replayed as one call: what graphs are on a device. Owns recording, keys and replay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from brim.kernels.base import Kernels, RecordedProgram

MAX_RECORDED_SEQS = 64


@dataclass(frozen=True, slots=True)
class ProgramKey:
    """num_seqs decoding sequences, one token each; greedy programs take the argmax path."""

    num_seqs: int
    all_greedy: bool


class DecodePrograms:
    """Programs by key. Empty where the kernels cannot record or the graph mode is NONE: steps then run call by call."""

    def __init__(self) -> None:
        self._programs: dict[ProgramKey, RecordedProgram] = {}

    def __len__(self) -> int:
        return len(self._programs)

    def record(self, kernels: Kernels, max_num_seqs: int, body: Callable[[int, bool], None]) -> None:
        """Record body(num_seqs, all_greedy) for every batch size up to max_num_seqs (at most 64)."""
        for num_seqs in range(1, min(max_num_seqs, MAX_RECORDED_SEQS) + 1):
            for all_greedy in (True, False):
                with kernels.record() as program:
                    body(num_seqs, all_greedy)
                self._programs[ProgramKey(num_seqs, all_greedy)] = program

    def get(self, num_seqs: int, all_greedy: bool) -> RecordedProgram | None:
        """The program of that step shape, if it was recorded."""
        return self._programs.get(ProgramKey(num_seqs, all_greedy))

    def clear(self) -> None:
        """Forget all programs (their addresses are about to go)."""
        self._programs.clear()
