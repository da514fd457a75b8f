"""How much of a long prompt a step computes while other sequences decode. Owns the pace and what it learns from the steps.

A prompt longer than the largest step is computed in chunks. Taken as large as a step allows, each chunk holds every stream up
for many times its usual time a token; a chunk of the pace makes a step take at most `_FACTOR` times what its decodes take
alone. Both times are measured as steps are settled: of steps that only decode, and what chunks of two sizes add to one, from
which follows what any chunk costs and what each of its tokens. Where the least chunk costs too much already, tokens that cost
little beside it are taken along. Prompts that fit a step are not held back (more sequences decoding is what throughput is made
of), and each request that waits allows as much again, so that under load the pace gives way to throughput.

Chunks beside decodes: Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from brim.engine.limits import EngineLimits
from brim.engine.sequence import Sequence

_FACTOR = 1.8
_UNIT_TOKENS = 128  # steps of whole units: captured sizes of steps with prompts lie that far apart
_SMALL_STEPS = (32, 64)  # sizes below a unit, and the least tokens of a chunk in them, where a device captures steps
_LEAST_IN_SMALL = 16
_FIRST_TOKENS = 256
_DECODE_WEIGHT, _CHUNK_WEIGHT = 0.2, 0.5  # of the newest step in what is known; a chunk's cost grows with its context
_MOST_GROWTH = 4  # of a chunk over the one before: what is known may be wrong
_WORTH = 1.25  # of what the least chunk costs, where that is too much already


@dataclass(slots=True)
class ChunkBudget:
    """Tokens of prompts that a step may still take: of all, and of those longer than long_from."""

    tokens: int
    long_tokens: int
    long_from: int
    num_long: int = 0
    num_short: int = 0

    def room(self, sequence: Sequence) -> int:
        """Tokens left for the sequence's next chunk."""
        return min(self.tokens, self.long_tokens) if sequence.num_tokens > self.long_from else self.tokens

    def take(self, sequence: Sequence, num_tokens: int) -> None:
        """The sequence computes so many."""
        self.tokens -= num_tokens
        if sequence.num_tokens > self.long_from:
            self.long_tokens -= num_tokens
            self.num_long += num_tokens
        else:
            self.num_short += num_tokens


@dataclass(frozen=True, slots=True)
class _Planned:
    at_s: float
    num_decodes: int
    num_long: int
    num_short: int


class ChunkPace:
    """Learns from the steps of one engine, which are planned and settled in order. clock: seconds that only grow."""

    def __init__(self, limits: EngineLimits, clock: Callable[[], float] = time.perf_counter) -> None:
        self._most = limits.max_num_batched_tokens
        self._can_split = limits.enable_chunked_prefill
        unit = max(1, min(_UNIT_TOKENS, self._most // 4))
        small = _SMALL_STEPS if unit == _UNIT_TOKENS else ()
        self._sizes = (*small, *range(unit, self._most, unit), self._most)
        self._least_chunk = _LEAST_IN_SMALL if small else unit // 2
        self._clock = clock
        self._planned: deque[_Planned] = deque()
        self._settled_s = 0.0
        self._decode_s: float | None = None
        self._newest: tuple[int, float] | None = None  # (tokens, seconds they added) of the last chunk,
        self._other: tuple[int, float] | None = None  # and of the last one of another size

    def budget(self, num_decodes: int, num_waiting: int) -> ChunkBudget:
        """For a step of so many decodes, while so many requests wait."""
        tokens = self._most - num_decodes
        long_tokens = self._long_tokens(num_decodes, num_waiting) if num_decodes and self._can_split else tokens
        return ChunkBudget(tokens, long_tokens, self._most)

    def planned(self, num_decodes: int, budget: ChunkBudget) -> None:
        """A step with so many decodes and what was taken of the budget was planned."""
        self._planned.append(_Planned(self._clock(), num_decodes, budget.num_long, budget.num_short))

    def settled(self) -> None:
        """The oldest planned step has ended."""
        step, now_s = self._planned.popleft(), self._clock()
        took_s = now_s - max(step.at_s, self._settled_s)
        self._settled_s = now_s
        if not step.num_decodes or step.num_short:
            return
        if not step.num_long:
            self._decode_s = _moved(self._decode_s, took_s, _DECODE_WEIGHT)
        elif self._decode_s is not None:
            self._learn(step.num_long, max(0.0, took_s - self._decode_s))

    def forget(self) -> None:
        """The steps that are planned will not be settled."""
        self._planned.clear()

    def _learn(self, num_tokens: int, added_s: float) -> None:
        if self._newest is not None and self._newest[0] == num_tokens:
            self._newest = (num_tokens, _moved(self._newest[1], added_s, _CHUNK_WEIGHT))
        else:
            self._newest, self._other = (num_tokens, added_s), self._newest

    def _cost(self, newest: tuple[int, float]) -> tuple[float, float]:
        """Seconds of any chunk at all, and of each of its tokens."""
        tokens, added_s = newest
        if self._other is not None:
            token_s = (added_s - self._other[1]) / (tokens - self._other[0])
            if 0 < token_s * tokens <= added_s:
                return added_s - token_s * tokens, token_s
        return 0.0, max(added_s / tokens, 1e-12)

    def _long_tokens(self, num_decodes: int, num_waiting: int) -> int:
        if not self._decode_s:
            return self._most - num_decodes
        room = float(_FIRST_TOKENS)
        if self._newest is not None:
            chunk_s, token_s = self._cost(self._newest)
            wanted_s = (_FACTOR - 1) * self._decode_s * (1 + num_waiting)
            room = (max(wanted_s, _WORTH * (chunk_s + token_s * self._least_chunk)) - chunk_s) / token_s
            room = min(room, _MOST_GROWTH * self._newest[0])
        wanted = bisect_right(self._sizes, num_decodes + room) - 1
        least = bisect_left(self._sizes, num_decodes + self._least_chunk)
        return self._sizes[min(max(wanted, least), len(self._sizes) - 1)] - num_decodes


def _moved(known: float | None, newest: float, weight: float) -> float:
    return newest if known is None else known + (newest - known) * weight
