"""The fake notices what it is there to notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Rigs = Callable[..., Any]


def running(rig: Rigs, windows: tuple[int, ...] = (0, 6)) -> Any:
    r = rig(windows, vocab_size=1 << 20)
    r.add("a", range(10))
    r.step()
    return r


def test_undisturbed_it_yields_the_expected_tokens(rig: Rigs) -> None:
    r = running(rig)
    r.run()
    assert r.tokens["a"] == r.expected("a")


@pytest.mark.parametrize("group", [0, 1])
def test_a_stale_table_changes_tokens(rig: Rigs, group: int) -> None:
    r = running(rig)
    blocks = r.scheduler.table.block_tables[group]
    blocks[0, 1], blocks[0, 2] = blocks[0, 2], blocks[0, 1]
    plan = r.scheduler.schedule()
    assert r.executor.execute(plan).token_ids[0] != r.expected("a")[1]


@pytest.mark.parametrize("group", [0, 1])
def test_an_overwritten_block_changes_tokens(rig: Rigs, group: int) -> None:
    r = running(rig)
    block = r.scheduler.table.block_tables[group][0, 1]
    r.executor._chain[group][block * 4 + 3] += 1
    assert r.executor.execute(r.scheduler.schedule()).token_ids[0] != r.expected("a")[1]


def test_uncommitted_memory_comes_back_as_poison(rig: Rigs) -> None:
    r = running(rig, (0,))
    r.executor.set_committed_blocks((2,))
    r.executor.set_committed_blocks((64,))
    assert r.executor.execute(r.scheduler.schedule()).token_ids[0] != r.expected("a")[1]


def test_a_new_token_without_a_block_is_an_error(rig: Rigs) -> None:
    r = running(rig, (0,))
    plan = r.scheduler.schedule()
    r.scheduler.table.block_tables[0][0, 2] = 0
    with pytest.raises(AssertionError, match="no block"):
        r.executor.execute(plan)
