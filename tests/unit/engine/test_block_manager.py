from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from brim.engine.block_hash import extend_block_hashes
from brim.engine.block_manager import BlockManager
from brim.engine.sampling_params import SamplingParams
from brim.engine.sequence import Sequence
from brim.engine.sequence_table import SequenceTable
from brim.memory.kv_layout import KVGroup, KVLayout

Layouts = Callable[..., KVLayout]


def sequence(prompt: list[int], name: str = "a", groups: int = 1, **more: Any) -> Sequence:
    return Sequence(name, prompt, SamplingParams(), max_total_tokens=64, num_groups=groups, **more)


def manager_of(layout: KVLayout, num_blocks: int = 20, **more: Any) -> tuple[BlockManager, SequenceTable]:
    table = SequenceTable(6, 64, layout)
    return BlockManager(layout, [num_blocks] * len(layout.groups), table, **more), table


def admit(manager: BlockManager, table: SequenceTable, seq: Sequence, num_tokens: int | None = None) -> int:
    """Admit and settle the whole prompt (or its first num_tokens after the hits); returns the hits."""
    prefix = manager.find_prefix(seq)
    count = seq.num_tokens - prefix.num_tokens if num_tokens is None else num_tokens
    assert manager.can_allocate(seq, count, prefix)
    table.take_row(seq)
    manager.allocate(seq, count, prefix)
    seq.num_computed_tokens += count
    seq.num_settled_tokens += count
    manager.settle(seq)
    return prefix.num_tokens


def leave(manager: BlockManager, table: SequenceTable, seq: Sequence) -> None:
    table.release_row(manager.free(seq))


def test_prefix_hits_whole_blocks_and_leaves_one_token(make_layout: Layouts) -> None:
    manager, table = manager_of(make_layout((0,)))
    first = sequence(list(range(12)))
    assert admit(manager, table, first) == 0
    assert admit(manager, table, sequence(list(range(12)), "same")) == 8  # not 12: the last token must be computed
    assert admit(manager, table, sequence([*range(10), 40, 41, 42], "longer")) == 8
    assert admit(manager, table, sequence([*range(7), 40, 41], "other")) == 4
    assert manager.pools[0].ref_count(first.block_ids[0][0]) == 4
    manager.check_integrity()


def test_equal_blocks_after_another_beginning_are_another_content(make_layout: Layouts) -> None:
    manager, table = manager_of(make_layout((0,)))
    admit(manager, table, sequence([1, 1, 1, 1, 5, 6, 7, 8, 9]))
    assert admit(manager, table, sequence([2, 2, 2, 2, 5, 6, 7, 8, 9], "b")) == 0


def test_extra_key_keeps_contents_apart(make_layout: Layouts) -> None:
    manager, table = manager_of(make_layout((0,)))
    admit(manager, table, sequence(list(range(9))))
    assert admit(manager, table, sequence(list(range(9)), "b", extra_key=b"adapter 7")) == 0
    assert admit(manager, table, sequence(list(range(9)), "c", extra_key=b"adapter 7")) == 8


def test_prompt_logprobs_take_no_hits(make_layout: Layouts) -> None:
    manager, table = manager_of(make_layout((0,)))
    admit(manager, table, sequence(list(range(9))))
    scored = Sequence("b", list(range(9)), SamplingParams(prompt_logprobs=1), max_total_tokens=64)
    assert manager.find_prefix(scored).num_tokens == 0


def test_caching_off_finds_nothing(make_layout: Layouts) -> None:
    manager, table = manager_of(make_layout((0,)), enable_prefix_caching=False)
    seq = sequence(list(range(9)))
    admit(manager, table, seq)
    leave(manager, table, seq)
    assert manager.find_prefix(sequence(list(range(9)), "b")).num_tokens == 0
    assert manager.counts[0].cached == 0


def test_sliding_group_keeps_only_its_window(make_layout: Layouts) -> None:
    manager, table = manager_of(make_layout((0, 6)))
    seq = sequence(list(range(21)), groups=2)
    admit(manager, table, seq)
    # the next query, 21, sees 16 .. 21: blocks 4 and 5
    assert [bool(b) for b in seq.block_ids[1]] == [False] * 4 + [True] * 2
    assert all(seq.block_ids[0])
    assert table.block_tables[1][seq.row, :4].tolist() == [0] * 4
    manager.check_integrity()


@pytest.mark.parametrize(("window", "size", "step"), [(6, 4, 1), (5, 4, 1), (4, 4, 1), (1, 4, 1), (9, 4, 3), (16, 4, 5)])
def test_sliding_group_never_passes_the_layouts_bound(make_layout: Layouts, window: int, size: int, step: int) -> None:
    layout = make_layout((window,), size)
    manager, table = manager_of(layout, 40)
    seq = sequence(list(range(60)))
    admit(manager, table, seq, 1)
    while seq.num_settled_tokens + step <= 60:
        assert manager.append_slots(seq, step)
        assert manager.counts[0].used <= layout.groups[0].blocks_for(60, size, step)
        seq.num_computed_tokens += step
        seq.num_settled_tokens += step
        if seq.num_settled_tokens >= seq.next_settle_tokens:
            manager.settle(seq)
        else:
            before = list(seq.block_ids[0])
            manager.settle(seq)
            assert seq.block_ids[0] == before, "next_settle_tokens came too late"


def test_sliding_hit_needs_only_the_window(make_layout: Layouts) -> None:
    manager, table = manager_of(make_layout((0, 6)), 20)
    first = sequence(list(range(25)), groups=2)
    admit(manager, table, first)
    leave(manager, table, first)
    sliding = manager.pools[1]
    hashes = extend_block_hashes(first, 6, 4)
    while any(sliding.lookup(block_hash) is not None for block_hash in hashes[:4]):
        sliding.take()  # evicts what was released first: blocks 0 .. 3, behind the window of a prefix of 24
    second = sequence(list(range(25)), "b", groups=2)
    prefix = manager.find_prefix(second)
    assert prefix.num_tokens == 24  # sees 19 .. 23: blocks 4 and 5
    assert prefix.blocks[1][:4] == (0,) * 4 and all(prefix.blocks[1][4:])
    sliding.take()  # evicts block 4
    assert manager.find_prefix(second).num_tokens == 0


def test_hits_that_nobody_references_count_against_what_is_free(make_layout: Layouts) -> None:
    manager, table = manager_of(make_layout((0,)), 5)
    first = sequence(list(range(12)))
    admit(manager, table, first)
    leave(manager, table, first)
    second = sequence(list(range(20)), "b")
    prefix = manager.find_prefix(second)
    assert prefix.num_tokens == 12 and manager.max_new_tokens(second, 8, prefix) == 4
    assert not manager.can_allocate(second, 8, prefix) and manager.can_allocate(second, 4, prefix)


def test_append_slots_takes_all_or_nothing(make_layout: Layouts) -> None:
    manager, table = manager_of(make_layout((0, 8)), 4)
    seq = sequence(list(range(20)), groups=2)
    admit(manager, table, seq, 4)
    assert not manager.append_slots(seq, 12)
    assert manager.counts[0].used == 1
    assert manager.append_slots(seq, 8) and manager.append_slots(seq, 8)


def test_detached_blocks_stay_taken_until_released(make_layout: Layouts) -> None:
    manager, table = manager_of(make_layout((0,)))
    seq = sequence(list(range(9)))
    admit(manager, table, seq)
    row = manager.detach(seq)
    assert manager.counts[0].used == 3 and seq.num_slots == 0
    manager.check_integrity()
    manager.release(row)
    assert manager.counts[0].used == 0 and manager.counts[0].cached == 2
    assert not table.block_tables[0].any()


def test_resize_moves_shared_blocks_in_every_table(make_layout: Layouts) -> None:
    manager, table = manager_of(make_layout((0,)), 20)
    filler = sequence(list(range(30, 50)), "filler")
    admit(manager, table, filler)
    first, second = sequence(list(range(9))), sequence([*range(8), 40], "b")
    admit(manager, table, first)
    admit(manager, table, second)
    leave(manager, table, filler)
    copies = manager.resize(0, 6)
    assert manager.num_blocks == (6,) and manager.counts[0].uncommitted == 14
    assert len({c.source for c in copies} | {c.target for c in copies}) == 2 * len(copies)
    assert first.block_ids[0][:2] == second.block_ids[0][:2] and max(first.block_ids[0] + second.block_ids[0]) < 6
    manager.check_integrity()
    manager.resize(0, 20)
    assert manager.counts[0].uncommitted == 0
    manager.check_integrity()


class ManagerMachine(RuleBasedStateMachine):
    """Random lives of sequences over a full and a sliding group, with resizes; the account must agree after each move."""

    def __init__(self) -> None:
        super().__init__()
        groups = (KVGroup("full", (0,), 0, 64), KVGroup("sliding", (1,), 7, 64))
        self.manager, self.table = manager_of(KVLayout(groups, 4, 1, 1, 1), 14)
        self.live: list[Sequence] = []
        self.count = 0

    @precondition(lambda self: self.table.num_free_rows)
    @rule(shared=st.integers(0, 20), own=st.integers(1, 9), part=st.integers(1, 30))
    def admit(self, shared: int, own: int, part: int) -> None:
        self.count += 1
        seq = sequence([*range(shared), *([30 + self.count % 3] * own)], str(self.count), groups=2)
        prefix = self.manager.find_prefix(seq)
        assert prefix.num_tokens < seq.num_tokens and prefix.num_tokens % 4 == 0
        room = self.manager.max_new_tokens(seq, min(part, seq.num_tokens - prefix.num_tokens), prefix)
        if room > 0:
            self.table.take_row(seq)
            self.manager.allocate(seq, room, prefix)
            seq.num_computed_tokens += room
            self.live.append(seq)

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 100), wanted=st.integers(1, 6))
    def advance(self, pick: int, wanted: int) -> None:
        seq = self.live[pick % len(self.live)]
        seq.num_settled_tokens = seq.num_computed_tokens
        self.manager.settle(seq)
        wanted = min(wanted, 60 - seq.num_tokens)
        if wanted > 0 and self.manager.append_slots(seq, wanted):
            while seq.num_tokens < seq.num_computed_tokens + wanted:
                seq.append_token(seq.num_tokens % 7)
            seq.num_computed_tokens += wanted

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 100))
    def leave(self, pick: int) -> None:
        leave(self.manager, self.table, self.live.pop(pick % len(self.live)))

    @rule(group=st.integers(0, 1), size=st.integers(2, 20))
    def resize(self, group: int, size: int) -> None:
        copies = self.manager.resize(group, size)
        assert all(copy.target < self.manager.num_blocks[group] <= copy.source for copy in copies)

    @invariant()
    def accounts_agree(self) -> None:
        self.manager.check_integrity()
        for seq in self.live:
            assert all(seq.block_ids[0]) and len(seq.block_ids[0]) * 4 == seq.num_slots >= seq.num_computed_tokens
            first_seen = max(0, seq.num_settled_tokens - 6) // 4
            assert all(seq.block_ids[1][first_seen:]) and len(seq.block_ids[1]) == len(seq.block_ids[0])


TestManagerMachine = ManagerMachine.TestCase
TestManagerMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
