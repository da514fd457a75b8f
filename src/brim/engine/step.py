"""What the scheduler hands to the executor for one step, and what comes back. Owns two plain values; torch-free.

A running sequence has a `row` (0 .. max_num_seqs-1) in the `SequenceTable` from admission until it finishes or is preempted;
block tables live there as numpy arrays that the executor reads, so a plan carries row numbers, not copies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from brim.engine.sequence import Sequence
    from brim.engine.sequence_table import SequenceTable


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy block `source` to `target` inside KV group `group` before the step (guard moves, copy-on-write)."""

    group: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step over S sequences and T tokens, decodes (query_len 1) first, then prefill chunks.

    sequences [S]: in order. rows [S] int32. query_lens [S] int32. start_positions [S] int32: tokens computed before this step.
    token_ids [T] int64: concatenated input ids; -1 where the id is the row's last sampled token, still on the device only.
    sample_indices [R] int32: which of the S sequences yield a token this step (those whose chunk reaches their last known
    token). prompt_logprob_indices: which of the S sequences want log-probabilities of this chunk's prompt tokens.
    """

    step_id: int
    table: SequenceTable
    sequences: tuple[Sequence, ...]
    rows: NDArray[np.int32]
    query_lens: NDArray[np.int32]
    start_positions: NDArray[np.int32]
    token_ids: NDArray[np.int64]
    sample_indices: NDArray[np.int32]
    prompt_logprob_indices: tuple[int, ...] = ()
    copies: tuple[BlockCopy, ...] = ()

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: the token's own, its rank (1 = best), and the best alternatives in order."""

    token_id: int
    logprob: float
    rank: int
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """token_ids [R] int64 in the order of plan.sample_indices. logprobs[i] only for rows that asked. prompt_logprobs: plan
    sequence index -> one entry a prompt token of the chunk whose successor is in the prompt (entry i scores the token after
    chunk position i). failed: plan sequence index -> reason, for rows whose logits were not finite."""

    step_id: int
    token_ids: NDArray[np.int64]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)


class Executor(ABC):
    """What the engine core needs of a worker. The torch-free seam: tests use a fake one (`engine.fake_executor`)."""

    @abstractmethod
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step to its end. Raises OutOfDeviceMemory (the guard may shrink and retry), DeviceLost, or others."""

    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Start one step; the returned call waits for its result. The plan's rows of the table are read before this returns.

        Steps run in the order of submission. This default runs the step at once; a device with a queue overrides it, so
        that the host plans step n+1 while n runs (pipeline_depth 2)."""
        result = self.execute(plan)
        return lambda: result

    @property
    def gives_back(self) -> bool:
        """Whether blocks that are not committed any more go back to the device."""
        return True

    @abstractmethod
    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        """Copy KV blocks now, between steps; sources and targets are disjoint. Needs no memory (the guard shrinks with it)."""

    @abstractmethod
    def set_committed_blocks(self, blocks: tuple[int, ...]) -> tuple[int, ...]:
        """Commit or uncommit each KV group's arena to hold exactly blocks[g] blocks; returns what is committed now."""

    @abstractmethod
    def pressure_bytes(self) -> int:
        """How many bytes the device asks us to give back now (0: none; negative: that many could be taken again)."""

    def memory_report(self) -> dict[str, Any]:
        """The device's account: cap_bytes, ledger, kv, phases (see memory.report); empty where there is none."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Give everything back."""
