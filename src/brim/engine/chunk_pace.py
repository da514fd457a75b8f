"""How much of a long prompt a step computes while other sequences decode. Owns the pace and what it learns from the steps.

A prompt longer than the largest step is computed in chunks. Taken as large as a step allows, each chunk holds every stream up
for many times its usual time a token; a chunk of the pace makes a step take at most `_FACTOR` times what its decodes take
alone. Both times are measured as steps are settled: of steps that only decode, and what chunks of each size add to one. Where
the least chunk costs too much already, one that costs little more is taken. Prompts that fit a step are not held back (more
sequences decoding is what throughput is made of), and each request that waits allows as much again, so that under load the
pace gives way to throughput.

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
_LATE = 1.25  # of the usual time: a step that seems to take more was noticed late, or the usual time grows slowly
_MOST_GROWTH = 2  # of a chunk over the largest that was measured
_WORTH = 1.25  # of what the least chunk costs, where that is too much already


@dataclass(slots=True)
class ChunkBudget:
    """Tokens of prompts that a step may still take: of all, and of those longer than long_from."""

    tokens: int
    long_tokens: int
    long_from: int
    num_long: int = 0
    num_short: int = 0
    context: int = 0  # of the last chunk of a long one

    def room(self, sequence: Sequence) -> int:
        """Tokens left for the sequence's next chunk."""
        return min(self.tokens, self.long_tokens) if sequence.num_tokens > self.long_from else self.tokens

    def take(self, sequence: Sequence, num_tokens: int) -> None:
        """The sequence computes so many."""
        self.tokens -= num_tokens
        if sequence.num_tokens > self.long_from:
            self.long_tokens -= num_tokens
            self.num_long += num_tokens
            self.context = sequence.num_computed_tokens
        else:
            self.num_short += num_tokens


@dataclass(frozen=True, slots=True)
class _Planned:
    at_s: float
    num_decodes: int
    num_long: int
    num_short: int
    context: int


class ChunkPace:
    """Learns from the steps of one engine, which are planned and settled in order. clock: seconds that only grow."""

    def __init__(self, limits: EngineLimits, clock: Callable[[], float] = time.perf_counter) -> None:
        self._most = limits.max_num_batched_tokens
        self._can_split = limits.enable_chunked_prefill
        unit = max(1, min(_UNIT_TOKENS, self._most // 4))
        small = _SMALL_STEPS if unit == _UNIT_TOKENS else ()
        self._sizes: tuple[int, ...] = (*small, *range(unit, self._most, unit), self._most)
        self._least_chunk = _LEAST_IN_SMALL if small else unit // 2
        self._clock = clock
        self._planned: deque[_Planned] = deque()
        self._settled_s = 0.0
        self._decode_s: float | None = None
        self._added_s: dict[int, float] = {}  # by the tokens of a chunk
        self._context = 0  # of the last one

    def budget(self, num_decodes: int, num_waiting: int) -> ChunkBudget:
        """For a step of so many decodes, while so many requests wait."""
        tokens = self._most - num_decodes
        long_tokens = self._long_tokens(num_decodes, num_waiting) if num_decodes and self._can_split else tokens
        return ChunkBudget(tokens, long_tokens, self._most)

    def planned(self, num_decodes: int, budget: ChunkBudget) -> None:
        """A step with so many decodes and what was taken of the budget was planned."""
        self._planned.append(_Planned(self._clock(), num_decodes, budget.num_long, budget.num_short, budget.context))

    def settled(self) -> None:
        """The oldest planned step has ended."""
        step, now_s = self._planned.popleft(), self._clock()
        took_s = now_s - max(step.at_s, self._settled_s)
        self._settled_s = now_s
        if not step.num_decodes or step.num_short:
            return
        if not step.num_long:
            most_s = took_s if self._decode_s is None else _LATE * self._decode_s
            self._decode_s = _moved(self._decode_s, min(took_s, most_s), _DECODE_WEIGHT)
        elif self._decode_s is not None:
            self._learn(step, max(0.0, took_s - self._decode_s))

    def forget(self) -> None:
        """The steps that are planned will not be settled."""
        self._planned.clear()

    def _learn(self, step: _Planned, added_s: float) -> None:
        """Costs grow with the context: those known of a longer one are forgotten."""
        if step.context < self._context:
            self._added_s.clear()
        self._context = step.context
        self._added_s[step.num_long] = _moved(self._added_s.get(step.num_long), added_s, _CHUNK_WEIGHT)

    def _estimates_s(self, chunks: list[int]) -> list[float]:
        """What chunks add to a step: as measured, or in proportion to the next smaller one that was, else the next larger."""
        known = sorted(self._added_s)
        nearest = [known[max(0, bisect_right(known, chunk) - 1)] for chunk in chunks]
        return [self._added_s[size] * (chunk / size) for chunk, size in zip(chunks, nearest, strict=True)]

    def _long_tokens(self, num_decodes: int, num_waiting: int) -> int:
        if not self._decode_s:
            return self._most - num_decodes
        least = min(bisect_left(self._sizes, num_decodes + self._least_chunk), len(self._sizes) - 1)
        chunks = [size - num_decodes for size in self._sizes[least:]]
        if not self._added_s:
            return max([chunk for chunk in chunks if chunk <= _FIRST_TOKENS], default=chunks[0])
        wanted_s = (_FACTOR - 1) * self._decode_s * (1 + num_waiting)
        most = _MOST_GROWTH * max(self._added_s)  # a step may seem to take no time, when the one before was noticed late
        estimates_s = self._estimates_s(chunks)
        fitting = [chunk for chunk, added_s in zip(chunks, estimates_s, strict=True) if chunk <= most and added_s <= wanted_s]
        if fitting:
            return fitting[-1]
        worth_s = _WORTH * estimates_s[0]
        return max([chunk for chunk in chunks if self._added_s.get(chunk, worth_s * 2) <= worth_s], default=chunks[0])


def _moved(known: float | None, newest: float, weight: float) -> float:
    return newest if known is None else known + (newest - known) * weight
