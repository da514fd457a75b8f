from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from brim.engine.block_pool import BlockPool


def test_block_zero_is_never_handed_out() -> None:
    pool = BlockPool(5)
    assert sorted(pool.take() for _ in range(4)) == [1, 2, 3, 4]
    assert pool.num_available == 0


def test_lowest_ids_first() -> None:
    assert BlockPool(5).take() == 1


def test_many_are_taken_in_the_order_of_one_after_the_other() -> None:
    pools = BlockPool(8), BlockPool(8)
    for pool in pools:
        pool.take_many(7)
        pool.register(3, b"x")
        pool.release([5, 3, 6, 0, 2])
    one, many = pools
    assert many.take_many(4) == [one.take() for _ in range(4)] == [2, 6, 5, 3]
    assert many.lookup(b"x") is None and many.take_many(0) == []
    many.check_integrity(dict.fromkeys(range(1, 8), 1))


def test_evicts_the_block_released_longest_ago() -> None:
    pool = BlockPool(4)
    blocks = [pool.take() for _ in range(3)]
    for block in blocks:
        pool.register(block, b"%d" % block)
    for block in (2, 1, 3):
        pool.release([block])
    assert pool.counts.cached == 3 and pool.counts.free == 0
    pool.share(2)  # used again: now 1 is the oldest
    assert pool.take() == 1
    assert pool.lookup(b"1") is None and pool.lookup(b"2") == 2


def test_second_block_of_equal_content_stays_unfindable() -> None:
    pool = BlockPool(4)
    first, second = pool.take(), pool.take()
    pool.register(first, b"x")
    pool.register(second, b"x")
    pool.release([second])
    assert pool.lookup(b"x") == first and pool.counts.free == 2


def test_releasing_twice_is_caught() -> None:
    pool = BlockPool(3)
    block = pool.take()
    pool.release([block])
    with pytest.raises(AssertionError, match="twice"):
        pool.release([block])


def test_shrink_moves_live_blocks_down_with_their_hash() -> None:
    pool = BlockPool(9)
    blocks = [pool.take() for _ in range(8)]
    pool.register(8, b"top")
    for block in blocks[:6]:
        pool.release([block])
    moves = pool.shrink(5)
    assert pool.num_blocks == 5 and {source for source, _ in moves} == {7, 8}
    assert all(target < 5 for _, target in moves)
    assert pool.lookup(b"top") == dict(moves)[8]
    assert pool.counts.uncommitted == 4
    pool.check_integrity({target: 1 for _, target in moves})


def test_shrink_stops_where_live_blocks_do_not_fit() -> None:
    pool = BlockPool(9)
    for _ in range(8):
        pool.take()
    pool.release([1])
    assert pool.shrink(3) == [(8, 1)]
    assert pool.num_blocks == 8
    pool.check_integrity(dict.fromkeys(range(1, 8), 1))


class PoolMachine(RuleBasedStateMachine):
    """Random operations against a plain account of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8)
        self.held: Counter[int] = Counter()
        self.next_hash = 0

    @precondition(lambda self: self.pool.num_available)
    @rule()
    def take(self) -> None:
        block = self.pool.take()
        assert not self.held[block] and block > 0
        self.held[block] = 1

    @rule(most=st.integers(0, 16))
    def take_many(self, most: int) -> None:
        count = min(most, self.pool.num_available)
        blocks = self.pool.take_many(count)
        assert len(set(blocks)) == count and not any(self.held[block] for block in blocks) and 0 not in blocks
        self.held.update(blocks)

    @precondition(lambda self: +self.held)
    @rule(picks=st.lists(st.integers(0, 100), max_size=6))
    def release(self, picks: list[int]) -> None:
        held = sorted((+self.held).elements())
        blocks = [held.pop(pick % len(held)) for pick in picks[: len(held)]]
        self.pool.release([*blocks, 0])
        self.held.subtract(blocks)

    @precondition(lambda self: +self.held)
    @rule(pick=st.integers(0, 100), known=st.booleans())
    def register(self, pick: int, known: bool) -> None:
        blocks = sorted(+self.held)
        self.next_hash += not known
        self.pool.register(blocks[pick % len(blocks)], b"%d" % self.next_hash)

    @rule(number=st.integers(0, 30))
    def find(self, number: int) -> None:
        block = self.pool.lookup(b"%d" % number)
        if block is not None:
            self.pool.share(block)
            self.held[block] += 1

    @rule(size=st.integers(2, 16))
    def resize(self, size: int) -> None:
        if size >= self.pool.num_blocks:
            self.pool.grow(size)
            return
        before = dict(+self.held)
        moves = dict(self.pool.shrink(size))
        assert not set(moves) & set(moves.values())
        self.held = Counter({moves.get(block, block): count for block, count in before.items()})
        assert self.pool.num_blocks == max(size, max(+self.held, default=0) + 1)

    @rule()
    def forget(self) -> None:
        self.pool.forget_cached()
        assert self.pool.counts.cached == 0

    @invariant()
    def accounts_agree(self) -> None:
        self.pool.check_integrity(dict(+self.held))
        assert self.pool.counts.total == self.pool.capacity - 1


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
