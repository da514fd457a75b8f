"""What ranks agree on while they start, each figure before anything is built from it. Owns which figures; `parallel` owns how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from brim.config.schema import BrimConfig, GraphMode
from brim.memory.plan import MemoryPlan
from brim.parallel.ranks import Ranks
from brim.platforms.base import Platform
from brim.worker.graph_choice import GraphChoice

if TYPE_CHECKING:
    from brim.worker.phases import StartSettings

# The least first: a device that captures one of them captures those before it.
_MODES: tuple[GraphMode, ...] = ("NONE", "FULL", "PIECEWISE", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")
_OTHER_RANK = "Another rank does without."


def agree_on_arena(platform: Platform, ranks: Ranks) -> None:
    """Virtual memory on all ranks or on none."""
    (virtual,) = ranks.minimum("virtual memory", [int(platform.capabilities.reserve_commit)])
    if not virtual and platform.capabilities.reserve_commit:
        platform.restrict(reserve_commit=False, arena_backend="static")
        platform.reasons["reserve_commit"] = _OTHER_RANK


def agree_on_settings(config: BrimConfig, plan: Callable[[BrimConfig], StartSettings], ranks: Ranks) -> StartSettings:
    """The settings of this rank with the shortest context, the least graph mode and the smallest reach of all.

    plan: makes the settings of a configuration. Raises what it raises, and RankFailed.
    """
    settings = plan(config)
    (length,) = ranks.minimum("the context length", [settings.limits.max_model_len])
    if length != settings.limits.max_model_len:
        settings = plan(replace(config, model=replace(config.model, max_model_len=length)))
    mode = ranks.least("the graph mode", settings.graphs.mode, _MODES)
    if mode != settings.graphs.mode:
        settings = replace(settings, graphs=GraphChoice(mode, _OTHER_RANK))
    reach = ranks.minimum("the reach of the KV cache", settings.plan.max_blocks)
    return replace(settings, plan=_within(replace(settings.plan, max_blocks=reach), reach))


def agree_on_graphs(captured: GraphChoice, capture: Callable[[GraphChoice], GraphChoice], ranks: Ranks) -> GraphChoice:
    """The mode that every rank has captured in the end. capture: captures so much instead, or less."""
    while True:
        place = _MODES.index(captured.mode)
        least, most = ranks.minimum("the captured graphs", [place, -place])
        if least == -most:
            return captured
        if least < place:
            captured = capture(GraphChoice(_MODES[least], _OTHER_RANK))


def agree_on_blocks(plan: MemoryPlan, ranks: Ranks) -> MemoryPlan:
    """The plan with as many KV blocks as every rank has."""
    return _within(plan, ranks.minimum("the KV blocks", plan.kv_blocks))


def _within(plan: MemoryPlan, most: tuple[int, ...]) -> MemoryPlan:
    blocks = tuple(min(pair) for pair in zip(plan.kv_blocks, most, strict=True))
    return plan if blocks == plan.kv_blocks else replace(plan, kv_blocks=blocks)
