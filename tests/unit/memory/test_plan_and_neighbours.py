"""What a plan does when other processes come and go between it and the commit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.unit.memory.test_planner import request

from brim.errors import MemoryBudgetError
from brim.memory.plan import MemoryPlan
from brim.memory.planner import make_plan
from brim.platforms.base import MemoryReading
from brim.units import GIB


def reading() -> MemoryReading:
    """A device of which a neighbour holds 2 GiB."""
    alone = request("max").reading
    return replace(alone, total_bytes=alone.total_bytes + 2 * GIB, others_bytes=alone.others_bytes + 2 * GIB)


def plan_for(memory: str) -> MemoryPlan:
    return make_plan(replace(request(memory), reading=reading(), reach_whole=True))


def test_max_takes_what_a_neighbour_gave_back() -> None:
    plan = plan_for("max")
    held = plan.ledger.without("kv_cache").held_bytes
    now = replace(reading(), free_bytes=reading().free_bytes + 2 * GIB)
    raised = plan.raised(now).settle(held, now.reachable_bytes - plan.budget.reserve_bytes)
    assert raised.cap_bytes == plan.cap_bytes + 2 * GIB
    assert raised.kv_bytes > plan.settle(held).kv_bytes + 2 * GIB - 64 * 1024 * 1024
    assert raised.reasons[-1].startswith("Other processes gave back 2")


@pytest.mark.parametrize("memory", ["4GiB", "50%", "enough"])
def test_a_cap_that_was_named_is_not_raised(memory: str) -> None:
    plan = plan_for(memory)
    assert plan.raised(replace(reading(), free_bytes=reading().free_bytes + 2 * GIB)) is plan


@pytest.mark.parametrize("memory", ["max", "4GiB"])
def test_what_a_neighbour_took_shrinks_the_blocks_and_not_the_cap(memory: str) -> None:
    plan = plan_for(memory)
    held = plan.ledger.without("kv_cache").held_bytes
    reachable = plan.cap_bytes - GIB
    smaller = plan.raised(reading()).settle(held, reachable)
    assert smaller.cap_bytes == plan.cap_bytes
    assert held + smaller.kv_bytes <= reachable < held + plan.settle(held).kv_bytes
    with pytest.raises(MemoryBudgetError, match="are there"):
        plan.settle(held, held)
