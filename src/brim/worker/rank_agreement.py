"""What ranks agree on while they start, each figure before anything is built from it. Owns which figures; `parallel` owns how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

from brim.config.schema import BrimConfig, GraphMode
from brim.memory.plan import MemoryPlan
from brim.parallel.ranks import Ranks
from brim.platforms.base import Platform
from brim.worker.graph_choice import GraphChoice

if TYPE_CHECKING:
    from brim.worker.phases import StartSettings

_MODES: tuple[GraphMode, ...] = get_args(GraphMode)
_OTHER_RANK = "Another rank does without."


def agree_on_arena(platform: Platform, ranks: Ranks) -> None:
    """Virtual memory on all ranks or on none."""
    (virtual,) = ranks.minimum("virtual memory", [int(platform.capabilities.reserve_commit)])
    if not virtual and platform.capabilities.reserve_commit:
        platform.restrict(reserve_commit=False, arena_backend="static")
        platform.reasons["reserve_commit"] = _OTHER_RANK


def agree_on_step_sizes(num_seqs: int, num_tokens: int, ranks: Ranks) -> tuple[int, int]:
    """Sequences and tokens of the largest step that every rank would form by itself."""
    agreed_seqs, agreed_tokens = ranks.minimum("the largest step", (num_seqs, num_tokens))
    return agreed_seqs, agreed_tokens


def agree_on_settings(config: BrimConfig, plan: Callable[[BrimConfig], StartSettings], ranks: Ranks) -> StartSettings:
    """The settings of this rank with the shortest context, the graphs that all have and the smallest reach.

    plan: makes the settings of a configuration. Raises what it raises, and RankFailed.
    """
    settings = plan(config)
    length, depth = ranks.minimum("the context length", (settings.limits.max_model_len, settings.pipeline_depth))
    if length != settings.limits.max_model_len:
        settings = plan(replace(config, model=replace(config.model, max_model_len=length)))
    settings = replace(settings, graphs=_common_graphs(settings.graphs, ranks), pipeline_depth=depth)
    reach = ranks.minimum("the reach of the KV cache", settings.plan.max_blocks)
    return replace(settings, plan=_within(replace(settings.plan, max_blocks=reach), reach))


def agree_on_graphs(captured: GraphChoice, capture: Callable[[GraphChoice], GraphChoice], ranks: Ranks) -> GraphChoice:
    """The mode that every rank has captured in the end. capture: captures so much instead, or less."""
    while True:
        common = _common_graphs(captured, ranks)
        (all_have_it,) = ranks.minimum("the captured graphs", [int(captured.mode == common.mode)])
        if all_have_it:
            return captured
        if captured.mode != common.mode:
            captured = capture(common)


def _common_graphs(choice: GraphChoice, ranks: Ranks) -> GraphChoice:
    """The mode that captures what the modes of all ranks capture. FULL and PIECEWISE have nothing in common: NONE."""
    common = ranks.minimum("the graph mode", _captures(choice.mode))
    if common == _captures(choice.mode):
        return choice
    return GraphChoice(next(mode for mode in _MODES if _captures(mode) == common), _OTHER_RANK)


def _captures(mode: GraphMode) -> tuple[int, int, int]:
    choice = GraphChoice(mode, "")
    return int(choice.decode_whole), int(choice.mixed_whole), int(choice.pieces)


def agree_on_blocks(plan: MemoryPlan, ranks: Ranks) -> MemoryPlan:
    """The plan with as many KV blocks as every rank has."""
    return _within(plan, ranks.minimum("the KV blocks", plan.kv_blocks))


def _within(plan: MemoryPlan, most: tuple[int, ...]) -> MemoryPlan:
    blocks = tuple(min(pair) for pair in zip(plan.kv_blocks, most, strict=True))
    return plan if blocks == plan.kv_blocks else replace(plan, kv_blocks=blocks)
