"""Ranks of a start over scripted devices: equal in everything that is built, together in every end."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from brim.config.schema import GraphMode
from brim.engine.messages import StartupProgress
from brim.errors import BrimError, MemoryBudgetError, OutOfDeviceMemory, RankFailed
from brim.kernels.base import Kernels
from brim.kernels.scripted import ScriptedKernels
from brim.models.base import Model
from brim.models.scripted import ScriptedModel
from brim.parallel.ranks import OneRank, Ranks
from brim.parallel.thread_ranks import ThreadMeeting
from brim.platforms.scenario import PHASES, Scenario, scenario_of
from brim.platforms.scripted_platform import ScriptedPlatform, scripted_platform
from brim.units import GIB
from brim.worker.device_worker import DeviceWorker
from brim.worker.graph_choice import GraphChoice
from brim.worker.phases import StartSettings
from brim.worker.rank_agreement import agree_on_graphs, agree_on_step_sizes
from brim.worker.rank_group import RankGroup
from brim.worker.scripted_start import config_of, device_of, source_of, start_scripted
from brim.worker.startup import start_worker

STARTING = [phase for phase in PHASES if phase not in ("committing", "serve")]


def scenario(ranks: int = 2, *changes: dict[str, Any], device: dict[str, Any] | None = None, **settings: Any) -> Scenario:
    document = {
        "title": "ranks",
        "sources": ["none"],
        "reported": "-",
        "ranks": ranks,
        "rank_changes": list(changes),
        "device": {"like": "cuda", "total": "12GiB", **(device or {})},
        "model": {"shape": "llama-3.2-1b"},
        "settings": {"max_model_len": 4096, "max_num_seqs": 64, "max_num_batched_tokens": 2048, **settings},
    }
    return scenario_of(document, "test")


def start_failing(
    one: Scenario, ranks: Ranks, fails_in: str, platform: ScriptedPlatform | None = None
) -> DeviceWorker | BaseException:
    """A rank that raises when a phase begins ("": none)."""
    platform = platform or scripted_platform(device_of(one))

    def make_model(kernels: Kernels, made: StartSettings) -> Model:
        allocate = platform.runtime.allocator.allocate
        length = made.limits.max_model_len
        return ScriptedModel(made.spec, kernels, made.dtype, length, platform.torch_device(), platform, allocate, one.ranks)

    def on_progress(progress: StartupProgress) -> None:
        if progress.phase == fails_in:
            raise ValueError("scripted")

    try:
        config, source = config_of(one), source_of(one)
        made = start_worker(
            config, platform, lambda _: ScriptedKernels(platform), source, on_progress, make_model=make_model, ranks=ranks
        )
    except (BrimError, ValueError) as error:
        return error
    finally:
        ranks.close()
    return made


@pytest.mark.parametrize("phase", STARTING)
def test_a_failure_in_any_phase_ends_all_ranks_with_its_reason(phase: str) -> None:
    one, meeting = scenario(3), ThreadMeeting(3)
    with ThreadPoolExecutor(3) as pool:
        ends = list(pool.map(lambda ranks: start_failing(one, ranks, phase if ranks.index == 1 else ""), meeting.ranks))
    told = f"Rank 1 failed in the phase {phase}: ValueError: scripted."
    assert [str(end) for end in ends] == [told, "scripted", told]
    assert isinstance(ends[0], RankFailed) and isinstance(ends[2], RankFailed)


def test_a_rank_whose_device_is_too_small_tells_the_other() -> None:
    found = start_scripted(scenario(2, {"rank": 1, "neighbour": "10GiB"}))
    assert isinstance(found.error, RankFailed) and "Rank 1 failed in the phase open: MemoryBudgetError" in str(found.error)
    assert isinstance(found.peers[0].error, MemoryBudgetError) and found.peers[0].error.ledger is not None


def test_the_context_that_fits_everywhere_is_the_shortest() -> None:
    alone = start_scripted(scenario(1, {"rank": 0, "neighbour": "7.5GiB"}, max_model_len="auto"))
    found = start_scripted(scenario(2, {"rank": 1, "neighbour": "7.5GiB"}, max_model_len="auto"))
    lengths = [one.worker.ready.plan.limits.max_model_len for one in (alone, *found.all_ranks) if one.worker is not None]
    assert len(lengths) == 3 and len(set(lengths)) == 1


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        ("FULL_AND_PIECEWISE", "FULL_DECODE_ONLY", "FULL_DECODE_ONLY"),
        ("FULL", "FULL_DECODE_ONLY", "FULL_DECODE_ONLY"),
        ("FULL", "PIECEWISE", "NONE"),
        ("PIECEWISE", "FULL_AND_PIECEWISE", "PIECEWISE"),
        ("FULL", "FULL", "FULL"),
    ],
)
def test_graphs_are_what_all_ranks_capture(first: GraphMode, second: GraphMode, both: GraphMode) -> None:
    """A rank may fall back by itself: no other is asked for what it cannot capture."""
    captured: list[list[GraphMode]] = [[], []]

    def agree(ranks: Ranks) -> GraphMode:
        def capture(choice: GraphChoice) -> GraphChoice:
            captured[ranks.index].append(choice.mode)
            return choice

        return agree_on_graphs(GraphChoice((first, second)[ranks.index], ""), capture, ranks).mode

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(agree, ThreadMeeting(2, 5.0).ranks)) == [both, both]
    assert captured == [[both] * (mode != both) for mode in (first, second)]


def test_the_largest_step_is_one_that_all_ranks_form() -> None:
    with ThreadPoolExecutor(2) as pool:
        found = list(
            pool.map(lambda ranks: agree_on_step_sizes(*((256, 4096), (64, 8192))[ranks.index], ranks), ThreadMeeting(2).ranks)
        )
    assert found == [(64, 4096)] * 2


@pytest.mark.parametrize("phase", STARTING)
def test_a_start_that_another_rank_ends_leaves_nothing_behind(phase: str) -> None:
    one, meeting = scenario(2), ThreadMeeting(2)
    platforms = [scripted_platform(device_of(one)) for _ in range(3)]
    worker = start_failing(one, OneRank(), "", platforms[2])
    assert isinstance(worker, DeviceWorker)
    worker.close()
    with ThreadPoolExecutor(2) as pool:
        ends = pool.map(lambda ranks: str(start_failing(one, ranks, phase * ranks.index, platforms[ranks.index])), meeting.ranks)
        assert list(ends) == [f"Rank 1 failed in the phase {phase}: ValueError: scripted.", "scripted"]
    gc.collect()
    for platform in platforms:
        platform.release_unused()
        assert platform.device.ours.get("arena", 0) == 0
        assert platform.device.ours_bytes <= platforms[2].device.ours_bytes, "more than a worker that was closed leaves"


def test_static_on_one_is_static_on_all() -> None:
    one, meeting = scenario(2), ThreadMeeting(2)
    poor = scenario(2, device={"virtual_memory": False})
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda ranks: start_failing(poor if ranks.index else one, ranks, ""), meeting.ranks))
    workers = [end for end in ends if isinstance(end, DeviceWorker)]
    platforms = [worker.ready.warm.reserved.loaded.opened.platform for worker in workers]
    assert [platform.capabilities.arena_backend for platform in platforms] == ["static", "static"]
    assert platforms[0].reasons["reserve_commit"] == "Another rank does without."
    assert workers[0].committed_blocks == workers[1].committed_blocks


def test_while_serving_ranks_stay_equal() -> None:
    found = start_scripted(scenario(2, {"rank": 1, "neighbour": "2GiB"}))
    workers = [one.worker for one in found.all_ranks if one.worker is not None]
    group = RankGroup(workers)
    (full,) = group.committed_blocks
    assert group.pressure_bytes() <= 0
    found.peers[0].device.move_neighbour("late", GIB)
    assert group.pressure_bytes() > 0
    (smaller,) = group.set_committed_blocks((full - full // 4,))
    assert smaller < full and workers[0].committed_blocks == workers[1].committed_blocks == (smaller,)
    found.peers[0].device.move_neighbour("late", 4 * GIB)
    with pytest.raises(OutOfDeviceMemory):
        group.set_committed_blocks((full,))
    assert workers[0].committed_blocks == workers[1].committed_blocks == (smaller,)
    group.close()
    assert all(one.device.ours.get("arena", 0) == 0 for one in found.all_ranks)
