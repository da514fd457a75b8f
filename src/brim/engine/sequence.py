"""One sequence: a prompt and the tokens generated for it. Owns its token buffer and its progress; not where its blocks come from.

Progress is three counts over positions 0 .. max_total_tokens-1:

    settled <= computed <= tokens + pending
    settled   K/V written by steps whose result has been read; a cancelled step falls back to here
    computed  K/V written once every planned step has run (equal to settled at pipeline depth 1 between steps)
    tokens    ids the host knows: the prompt and what was generated
    pending   ids sampled by planned steps that the host does not know yet
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from brim.engine.messages import PositionLogprobs
from brim.engine.sampling_params import SamplingParams

NO_ROW = -1


class SequenceStatus(Enum):
    """waiting -> running -> finished, with running -> preempted -> running any number of times."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class Sequence:
    """A prompt and its growing continuation.

    token_ids: int64 buffer, valid in [:num_tokens], replaced when it must grow. block_ids[g][i]: block of positions
    i*B .. i*B+B-1 in KV group g, 0 where a sliding window has left it behind. num_slots: positions that have a block.
    order: (priority, number of arrival), the lowest is served first. seed: always drawn. may_be_special: False where neither
    `is_special` nor `needs_host_tokens` ever holds.
    """

    __slots__ = (
        "_always_special", "_needs_history", "_token_ids", "arrival_s", "block_hashes", "block_ids", "extra_key",
        "first_blocks", "last_step_id", "last_token", "max_total_tokens", "may_be_special", "next_settle_tokens",
        "num_cached_tokens", "num_committed_blocks", "num_computed_tokens", "num_pending_tokens", "num_preemptions",
        "num_prompt_tokens", "num_settled_tokens", "num_slots", "num_tokens", "order", "params", "prompt_logprobs",
        "request_id", "row", "seed", "status", "stop_ids",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        prompt_ids: SequenceABC[int] | NDArray[np.int64],
        params: SamplingParams,
        *,
        max_total_tokens: int,
        seed: int = 0,
        eos_token_ids: SequenceABC[int] = (),
        num_groups: int = 1,
        order: tuple[int, int] = (0, 0),
        arrival_s: float = 0.0,
        extra_key: bytes = b"",
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.num_prompt_tokens = len(prompt_ids)
        self.max_total_tokens = max_total_tokens
        self.seed = seed
        self.order = order
        self.arrival_s = arrival_s
        self.extra_key = extra_key
        self.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(eos_token_ids))
        self._needs_history = params.needs_history
        self._always_special = params.needs_history or bool(params.logit_bias) or params.logprobs is not None
        self.may_be_special = self._always_special or params.min_tokens > 0
        self._token_ids = np.zeros(min(max_total_tokens, self.num_prompt_tokens + 256), dtype=np.int64)
        self._token_ids[: self.num_prompt_tokens] = prompt_ids
        self.num_tokens = self.num_prompt_tokens
        self.last_token = int(self._token_ids[self.num_tokens - 1])
        self.num_pending_tokens = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.last_step_id = -1
        self.block_hashes: list[bytes] = []
        self.prompt_logprobs: list[PositionLogprobs | None] | None = None if params.prompt_logprobs is None else [None]
        self.status = SequenceStatus.WAITING
        self.forget_blocks(num_groups)

    def __repr__(self) -> str:
        return f"Sequence({self.request_id!r}, {self.status.value}, {self.num_computed_tokens}/{self.num_tokens} tokens)"

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """The buffer; ids are valid in [:num_tokens]."""
        return self._token_ids

    @property
    def num_output_tokens(self) -> int:
        """Generated ids the host knows."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def output_ids(self) -> NDArray[np.int64]:
        """Generated ids, as a view."""
        return self._token_ids[self.num_prompt_tokens : self.num_tokens]

    @property
    def is_special(self) -> bool:
        """True where sampling needs more than the table's arrays: history, biases, log-probabilities or banned ids."""
        return self._always_special or self.num_output_tokens < self.params.min_tokens

    @property
    def needs_host_tokens(self) -> bool:
        """True where the next token depends on ids or counts that only the host keeps: it is not planned ahead of them."""
        return self._needs_history or self.num_output_tokens < self.params.min_tokens

    def append_token(self, token_id: int) -> None:
        """Add a generated id; the buffer doubles when full, never beyond max_total_tokens."""
        count = self.num_tokens
        if count == len(self._token_ids):
            grown = np.zeros(max(count + 1, min(self.max_total_tokens, 2 * count)), dtype=np.int64)
            grown[:count] = self._token_ids
            self._token_ids = grown
        self._token_ids[count] = token_id
        self.last_token = token_id
        self.num_tokens = count + 1

    def forget_blocks(self, num_groups: int) -> None:
        """Back to nothing computed and no blocks held (new, or after a preemption). Generated ids stay."""
        self.row = NO_ROW
        self.block_ids: list[list[int]] = [[] for _ in range(num_groups)]
        self.first_blocks = [0] * num_groups
        self.num_slots = 0
        self.num_computed_tokens = 0
        self.num_settled_tokens = 0
        self.num_committed_blocks = 0
        self.next_settle_tokens = 0
        if self.prompt_logprobs is not None:
            del self.prompt_logprobs[1:]
