"""Which sequence holds which KV blocks. Owns allocation over all KV groups, the prefix cache, and moving blocks to shrink.

    positions of a running sequence, B = block_size, w = window of a sliding group

      full group     [ prefix hits (shared) | own blocks ............................ | slots not written yet ]
      sliding group  [ 0 0 0 0 | behind no future query's window: held .............. | slots not written yet ]
                               ^ block (num_settled - w + 1) // B

Blocks behind the window are released when a step is settled, never when it is planned, so that a cancelled step can be
planned again. Full blocks become findable (hashed) when settled, so a failed step never leaves wrong content behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

from brim.engine.block_hash import extend_block_hashes
from brim.engine.block_pool import BlockCounts, BlockPool
from brim.engine.sequence import Sequence
from brim.engine.sequence_table import SequenceTable
from brim.engine.step import BlockCopy
from brim.memory.kv_layout import KVGroup, KVLayout
from brim.units import ceil_div

_NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """Leading tokens of a sequence whose K/V is there already. blocks[g]: one id a block, 0 behind a sliding window."""

    num_tokens: int
    blocks: tuple[tuple[int, ...], ...]


class BlockManager:
    """Blocks of all sequences that have a row; their ids are mirrored into the table's block tables.

    num_blocks[g] counts block 0; capacity[g] is how far the group may grow while serving (None: no further).
    A sequence holds the same number of table entries in every group (`num_slots / B`).
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: SequenceABC[int],
        table: SequenceTable,
        *,
        enable_prefix_caching: bool = True,
        capacity: SequenceABC[int] | None = None,
    ) -> None:
        self.layout = layout
        self.block_size = layout.block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.pools = tuple(BlockPool(n, most) for n, most in zip(num_blocks, capacity or num_blocks, strict=True))
        assert len(self.pools) == len(layout.groups)
        self._groups = tuple(enumerate(zip(layout.groups, self.pools, table.block_tables, strict=True)))
        self._sliding = tuple((g, group.window) for g, group in enumerate(layout.groups) if group.window)
        self._held: dict[int, list[list[int]]] = {}  # row -> block ids, detached sequences included

    # -- what is there

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """Committed blocks of each group, block 0 included."""
        return tuple(pool.num_blocks for pool in self.pools)

    @property
    def counts(self) -> tuple[BlockCounts, ...]:
        """Blocks of each group by state."""
        return tuple(pool.counts for pool in self.pools)

    def blocks_for(self, group: KVGroup, num_tokens: int) -> int:
        """Least blocks with which a sequence can reach num_tokens positions on its own, going in steps of one token."""
        return group.blocks_for(num_tokens, self.block_size, 1)

    def fits_alone(self, num_tokens: int, *, capacity: bool = True) -> bool:
        """True where a sequence of num_tokens positions could run if it had every block (uncommitted ones too, by default)."""
        sizes = ((pool.capacity if capacity else pool.num_blocks) - 1 for pool in self.pools)
        return all(self.blocks_for(group, num_tokens) <= n for group, n in zip(self.layout.groups, sizes, strict=True))

    # -- prefix cache

    def find_prefix(self, sequence: Sequence) -> CachedPrefix:
        """The longest usable prefix in whole blocks; nothing is taken yet. At least the last known token is left to compute.

        A full group needs every block of the prefix. A sliding group needs only those the next query sees: positions
        n-w+1 .. n-1, so the last ceil((w-1)/B) blocks. Example: B 16, w 512, n 1,024: blocks 32 .. 63.
        """
        wants_prompt_logprobs = sequence.prompt_logprobs is not None
        if not self.enable_prefix_caching or wants_prompt_logprobs:
            return CachedPrefix(0, ((),) * len(self.pools))
        num_blocks = (sequence.num_tokens - 1) // self.block_size
        hashes = extend_block_hashes(sequence, num_blocks, self.block_size)[:num_blocks]
        for _, (group, pool, _) in self._groups:
            if not group.window:
                num_blocks = next((i for i, h in enumerate(hashes[:num_blocks]) if pool.lookup(h) is None), num_blocks)
        for g, window in self._sliding:
            if not num_blocks:
                break
            num_blocks = min(num_blocks, self._sliding_hit(self.pools[g], window, hashes[:num_blocks]))
        while num_blocks and not all(self._covers(g, w, hashes, num_blocks) for g, w in self._sliding):
            num_blocks -= 1
        blocks = tuple(self._hit_blocks(pool, group.window, hashes, num_blocks) for _, (group, pool, _) in self._groups)
        return CachedPrefix(num_blocks * self.block_size, blocks)

    def _first_needed(self, window: int, num_blocks: int) -> int:
        return max(0, num_blocks - ceil_div(window - 1, self.block_size)) if window else 0

    def _sliding_hit(self, pool: BlockPool, window: int, hashes: list[bytes]) -> int:
        """The longest prefix in blocks whose window is cached: scan from the end for a long enough run of hits."""
        end = len(hashes)
        first = self._first_needed(window, end)
        for index in range(end - 1, -1, -1):
            if index < first:
                break
            if pool.lookup(hashes[index]) is None:
                end = index
                first = self._first_needed(window, end)
        return end

    def _covers(self, g: int, window: int, hashes: list[bytes], num_blocks: int) -> bool:
        first = self._first_needed(window, num_blocks)
        return all(self.pools[g].lookup(h) is not None for h in hashes[first:num_blocks])

    def _hit_blocks(self, pool: BlockPool, window: int, hashes: list[bytes], num_blocks: int) -> tuple[int, ...]:
        first = self._first_needed(window, num_blocks)
        return (0,) * first + tuple(pool.lookup(h) or 0 for h in hashes[first:num_blocks])

    # -- allocation

    def max_new_tokens(self, sequence: Sequence, limit: int, prefix: CachedPrefix | None = None) -> int:
        """How many of the next `limit` positions can have a slot now: after what it holds, or after a prefix it would take."""
        if prefix is None:
            free = min(pool.num_available for pool in self.pools)
            return min(limit, sequence.num_slots - sequence.num_computed_tokens + free * self.block_size)
        room = limit
        for pool, blocks in zip(self.pools, prefix.blocks, strict=True):
            room = min(room, (pool.num_available - self._num_revived(pool, blocks)) * self.block_size)
        return room

    @staticmethod
    def _num_revived(pool: BlockPool, blocks: tuple[int, ...]) -> int:
        return sum(1 for block in blocks if block and pool.ref_count(block) == 0)

    def can_allocate(self, sequence: Sequence, num_new_tokens: int, prefix: CachedPrefix) -> bool:
        """True where `allocate` with the same arguments would succeed."""
        return self.max_new_tokens(sequence, num_new_tokens, prefix) == num_new_tokens

    def allocate(self, sequence: Sequence, num_new_tokens: int, prefix: CachedPrefix) -> None:
        """Admit a sequence that has a row and no blocks: take the prefix, and blocks for num_new_tokens after it."""
        row = sequence.row
        assert row >= 0 and row not in self._held and sequence.num_slots == 0
        num_hits = prefix.num_tokens // self.block_size
        for g, (group, pool, block_table) in self._groups:
            blocks = sequence.block_ids[g]
            for block in prefix.blocks[g]:
                if block:
                    pool.share(block)
            blocks.extend(prefix.blocks[g])
            block_table[row, :num_hits] = blocks
            sequence.first_blocks[g] = self._first_needed(group.window, num_hits)
        self._held[row] = sequence.block_ids
        sequence.num_slots = sequence.num_computed_tokens = sequence.num_settled_tokens = prefix.num_tokens
        sequence.num_committed_blocks = num_hits
        sequence.next_settle_tokens = self._next_settle(sequence)
        taken = self.append_slots(sequence, num_new_tokens)
        assert taken, "allocate without can_allocate"

    def append_slots(self, sequence: Sequence, num_new_tokens: int) -> bool:
        """Give the next num_new_tokens positions a slot each; False, with nothing taken, where blocks are missing."""
        missing = ceil_div(sequence.num_computed_tokens + num_new_tokens - sequence.num_slots, self.block_size)
        if missing <= 0:
            return True
        for pool in self.pools:
            if pool.num_available < missing:
                return False
        row = sequence.row
        first = sequence.num_slots // self.block_size
        for g, (_, pool, block_table) in self._groups:
            new = pool.take_many(missing)
            sequence.block_ids[g].extend(new)
            block_table[row, first : first + missing] = new
        sequence.num_slots += missing * self.block_size
        return True

    # -- after a step

    def settle(self, sequence: Sequence) -> None:
        """num_settled_tokens moved: make full blocks findable, then release what no future query sees."""
        if self.enable_prefix_caching:
            self._commit(sequence)
        if self._sliding:
            self.free_out_of_window(sequence)
        sequence.next_settle_tokens = self._next_settle(sequence)

    def _commit(self, sequence: Sequence) -> None:
        first, last = sequence.num_committed_blocks, sequence.num_settled_tokens // self.block_size
        if first == last:
            return
        hashes = extend_block_hashes(sequence, last, self.block_size)
        for pool, blocks in zip(self.pools, sequence.block_ids, strict=True):
            for index in range(first, last):
                pool.register(blocks[index], hashes[index])
        sequence.num_committed_blocks = last

    def free_out_of_window(self, sequence: Sequence) -> None:
        """Release the blocks of sliding groups that end before position num_settled - w + 1; their entries become 0."""
        for g, window in self._sliding:
            first, last = sequence.first_blocks[g], max(0, sequence.num_settled_tokens - window + 1) // self.block_size
            if last > first:
                blocks, pool = sequence.block_ids[g], self.pools[g]
                pool.release(blocks[first:last])
                blocks[first:last] = [0] * (last - first)
                self._groups[g][1][2][sequence.row, first:last] = 0
                sequence.first_blocks[g] = last

    def _next_settle(self, sequence: Sequence) -> int:
        """The least num_settled_tokens at which `settle` has something to do again."""
        size = self.block_size
        due = (sequence.num_committed_blocks + 1) * size if self.enable_prefix_caching else _NEVER
        for g, window in self._sliding:
            due = min(due, (sequence.first_blocks[g] + 1) * size + window - 1)
        return due

    # -- giving back

    def detach(self, sequence: Sequence) -> int:
        """The sequence forgets its row and blocks, which stay taken until `release(row)`: a step may still write to them."""
        row = sequence.row
        sequence.forget_blocks(len(self.pools))
        return row

    def release(self, row: int) -> None:
        """Give back the blocks that hang on a row, the last first: the tail of a prefix is evicted before its head."""
        for (_, (_, pool, block_table)), blocks in zip(self._groups, self._held.pop(row), strict=True):
            pool.release(reversed(blocks))
            block_table[row, : len(blocks)] = 0

    def free(self, sequence: Sequence) -> int:
        """detach and release at once; returns the row."""
        row = self.detach(sequence)
        self.release(row)
        return row

    # -- changing size

    def resize(self, group: int, num_blocks: int) -> list[BlockCopy]:
        """Shrink or grow a group to num_blocks (at least 2), or shrink as far as live blocks can move; tables follow.

        The copies must run before the ids from the new `num_blocks[group]` up are uncommitted. No step may be in flight.
        """
        pool = self.pools[group]
        if num_blocks >= pool.num_blocks:
            pool.grow(num_blocks)
            return []
        moves = dict(pool.shrink(max(2, num_blocks)))
        block_table = self._groups[group][1][2]
        if moves:
            for row, held in self._held.items():
                blocks = held[group]
                for index, block in enumerate(blocks):
                    if block in moves:
                        blocks[index] = block_table[row, index] = moves[block]
        return [BlockCopy(group, source, target) for source, target in moves.items()]

    def forget_cached(self) -> None:
        """Empty the prefix cache of what nobody references."""
        for pool in self.pools:
            pool.forget_cached()

    def check_integrity(self) -> None:
        """Prove, for each group: free + used + cached + uncommitted = total, reference counts = table entries."""
        for g, (_, pool, block_table) in self._groups:
            held: Counter[int] = Counter()
            for row, groups in self._held.items():
                blocks = groups[g]
                live = [block for block in blocks if block]
                assert len(set(live)) == len(live), "a block is twice in one table"
                assert block_table[row, : len(blocks)].tolist() == blocks, "table and sequence disagree"
                assert not block_table[row, len(blocks) :].any(), "entries beyond the sequence's blocks"
                held.update(live)
            pool.check_integrity(dict(held))
            counts = pool.counts
            assert counts.total == pool.capacity - 1, "free + used + cached + uncommitted differs from the total"
