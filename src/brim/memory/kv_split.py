"""Splits a byte budget over KV groups so that one full-length request always fits. Owns minimum, enough and the split.

One number x decides all groups: a group gets x blocks, at least what one request of max_model_len needs and (sliding) at
most what no workload can exceed. Every count grows with x, so the largest x within a budget is found by bisection. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

from brim.memory.kv_layout import KVLayout
from brim.memory.step_memory import StepLimits
from brim.units import ceil_div, round_up


@dataclass(frozen=True, slots=True)
class KVSplit:
    """The KV needs of one layout under step limits. granularity_bytes: what the arena rounds each group up to."""

    layout: KVLayout
    limits: StepLimits
    granularity_bytes: int = 1

    def bytes_for(self, blocks: tuple[int, ...]) -> int:
        """Bytes that these blocks take when committed, rounding included."""
        pairs = zip(blocks, self.layout.groups, strict=True)
        return sum(round_up(count * group.block_bytes, self.granularity_bytes) for count, group in pairs)

    @property
    def minimum(self) -> tuple[int, ...]:
        """One request of max_model_len with its largest step, plus block 0, in each group.

        Example: length 4,096, block 16, step 512, window 512: full 256 + 1, sliding ceil(1,023 / 16) + 1 + 1 = 66.
        """
        length = self.limits.max_model_len
        step = min(length, self.limits.max_num_tokens)
        return tuple(group.blocks_for(length, self.layout.block_size, step) + 1 for group in self.layout.groups)

    @property
    def enough(self) -> tuple[int, ...]:
        """max_num_seqs requests of max_model_len at once, plus block 0; sliding groups at most their cap."""
        return self.blocks_at(self.limits.max_num_seqs * ceil_div(self.limits.max_model_len, self.layout.block_size) + 1)

    def blocks_at(self, x: int) -> tuple[int, ...]:
        """The member x of the family."""
        blocks = []
        for group, least in zip(self.layout.groups, self.minimum, strict=True):
            most = x
            if group.window:
                cap = self.layout.sliding_cap_blocks(group, self.limits.max_num_seqs, self.limits.max_num_tokens)
                most = min(x, cap)
            blocks.append(max(least, most))
        return tuple(blocks)

    def within(self, num_bytes: int) -> tuple[int, ...] | None:
        """The largest member whose bytes stay within num_bytes; None where not even one request fits."""
        if self.bytes_for(self.minimum) > num_bytes:
            return None
        low, high = 0, num_bytes // min(g.block_bytes for g in self.layout.groups) + 1
        if all(group.window for group in self.layout.groups):  # beyond every cap, more is not used
            high = min(high, max(self.blocks_at(high)))
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.bytes_for(self.blocks_at(middle)) <= num_bytes else (low, middle - 1)
        return self.blocks_at(low)

    def full_length_requests(self, blocks: tuple[int, ...]) -> int:
        """How many requests of max_model_len fit at once, one of them in its largest prefill step."""
        length, block_size = self.limits.max_model_len, self.layout.block_size
        counts = []
        for count, group, least in zip(blocks, self.layout.groups, self.minimum, strict=True):
            steady = group.blocks_for(length, block_size, 1)
            counts.append((count - least) // steady + 1 if count >= least else 0)
        return min(counts)
