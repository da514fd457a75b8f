"""The block ids of one KV group. Owns which ids are free, referenced or cached, and their hashes; not whose they are.

ids 1 .. num_blocks-1, each in exactly one state        id 0 is never handed out: padding and dummy steps write there
  free    in the free list, content meaningless
  used    referenced by one or more sequences, hashed or not
  cached  referenced by nobody, hashed: its content can be found again, or evicted (least recently released first)
ids num_blocks .. capacity-1 are uncommitted: given back to the device, for now
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """Blocks of one group by state; block 0 is in none of them. free + used + cached + uncommitted = capacity - 1."""

    free: int
    used: int
    cached: int
    uncommitted: int

    @property
    def total(self) -> int:
        """All blocks the group could ever hand out."""
        return self.free + self.used + self.cached + self.uncommitted


class BlockPool:
    """All operations are O(1) but `shrink`, `grow` and `check_integrity`."""

    def __init__(self, num_blocks: int, capacity: int | None = None) -> None:
        """capacity: how far the pool may grow; None: no further than num_blocks."""
        if num_blocks < 2:
            raise ValueError(f"a KV group needs at least 2 blocks (one is reserved), not {num_blocks}")
        self.num_blocks = num_blocks
        self.capacity = max(num_blocks, capacity or 0)
        self._free = list(range(num_blocks - 1, 0, -1))
        self._ref_counts = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Blocks that `take` could hand out: free and cached."""
        return len(self._free) + len(self._cached)

    @property
    def counts(self) -> BlockCounts:
        """Blocks by state."""
        free, cached = len(self._free), len(self._cached)
        return BlockCounts(free, self.num_blocks - 1 - free - cached, cached, self.capacity - self.num_blocks)

    def ref_count(self, block: int) -> int:
        """Sequences that hold the block."""
        return self._ref_counts[block]

    def take(self) -> int:
        """A block for new content, referenced once; evicts the block released longest ago when none is free.

        The caller has checked `num_available`."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self._ref_counts[block] = 1
        return block

    def take_many(self, count: int) -> list[int]:
        """As `take`, so many times."""
        taken = self._free[: -count - 1 : -1]
        del self._free[len(self._free) - len(taken) :]
        for block in taken:
            self._ref_counts[block] = 1
        return taken + [self.take() for _ in range(count - len(taken))]

    def lookup(self, block_hash: bytes) -> int | None:
        """The block with this content, used or cached."""
        return self._block_of.get(block_hash)

    def share(self, block: int) -> None:
        """One more sequence holds the block, which is used or cached."""
        if self._ref_counts[block] == 0:
            del self._cached[block]
        self._ref_counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One sequence less for each, in this order; the last one leaves a block cached when hashed, else free. Zeros are left
        out: they stand for no block."""
        ref_counts, hash_of, free = self._ref_counts, self._hash_of, self._free
        for block in blocks:
            if not block:
                continue
            count = ref_counts[block] - 1
            assert count >= 0, f"block {block} was released twice"
            ref_counts[block] = count
            if not count:
                if block in hash_of:
                    self._cached[block] = None
                else:
                    free.append(block)

    def register(self, block: int, block_hash: bytes) -> None:
        """The used block now holds this content for good. Where another block does already, this one stays unfindable."""
        if block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def forget_cached(self) -> None:
        """Drop all cached content nobody references."""
        for block in self._cached:
            del self._block_of[self._hash_of.pop(block)]
            self._free.append(block)
        self._cached.clear()

    def shrink(self, num_blocks: int) -> list[tuple[int, int]]:
        """Give back ids from num_blocks up, as far as live blocks can be moved to lower ids; `num_blocks` says how far.

        Free and cached ids are dropped; used ones move (source, target), the highest first, to free or evicted lower ids.
        Sources and targets are disjoint, so copies may run in any order, before the sources are given back.
        """
        assert 2 <= num_blocks <= self.num_blocks
        for block in [b for b in self._cached if b >= num_blocks]:
            del self._cached[block]
            del self._block_of[self._hash_of.pop(block)]
        self._free = [b for b in self._free if b < num_blocks]
        live = [b for b in range(num_blocks, self.num_blocks) if self._ref_counts[b]]
        moves = []
        while live and self.num_available:
            source, target = live.pop(), self.take()
            self._move(source, target)
            moves.append((source, target))
        self.num_blocks = live[-1] + 1 if live else num_blocks
        del self._ref_counts[self.num_blocks :]
        kept = set(live)
        self._free[:0] = [b for b in range(self.num_blocks - 1, num_blocks - 1, -1) if b not in kept]
        return moves

    def grow(self, num_blocks: int) -> None:
        """Add the ids up to num_blocks-1, free."""
        assert num_blocks >= self.num_blocks
        self._free[:0] = range(num_blocks - 1, self.num_blocks - 1, -1)
        self._ref_counts.extend([0] * (num_blocks - self.num_blocks))
        self.num_blocks = num_blocks
        self.capacity = max(self.capacity, num_blocks)

    def _move(self, source: int, target: int) -> None:
        self._ref_counts[target] = self._ref_counts[source]
        self._ref_counts[source] = 0
        block_hash = self._hash_of.pop(source, None)
        if block_hash is not None:
            self._hash_of[target] = block_hash
            self._block_of[block_hash] = target

    def check_integrity(self, held: dict[int, int]) -> None:
        """Prove the states partition the ids and that `held` (block -> times in a table) are the reference counts."""
        free, cached = set(self._free), set(self._cached)
        used = {b for b in range(self.num_blocks) if self._ref_counts[b] > 0}
        assert len(free) == len(self._free), "a block is twice in the free list"
        assert not free & cached and not free & used and not cached & used, "a block is in two states"
        assert free | cached | used == set(range(1, self.num_blocks)), "a block is in no state"
        assert len(self._ref_counts) == self.num_blocks <= self.capacity
        assert {b: self._ref_counts[b] for b in used} == held, "reference counts differ from the tables"
        assert all(b in self._hash_of for b in cached) and not any(b in self._hash_of for b in free)
        assert {h: b for b, h in self._hash_of.items()} == self._block_of, "hashes and blocks disagree"
