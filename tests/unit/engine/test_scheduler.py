from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from brim.engine.limits import EngineLimits
from brim.engine.sampling_params import SamplingParams
from brim.engine.step import StepPlan, StepResult
from brim.errors import ConfigError

Rigs = Callable[..., Any]


def greedy(max_tokens: int = 8, **more: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **more})


def plan_of(r: Any) -> StepPlan:
    plan = r.scheduler.schedule()
    assert plan is not None
    return plan


def settle(r: Any, plan: StepPlan) -> list[Any]:
    return r.scheduler.update(plan, r.executor.execute(plan))  # type: ignore[no-any-return]


def test_decodes_come_first_and_chunks_fill_the_budget(rig: Rigs) -> None:
    r = rig(max_num_batched_tokens=10)
    r.add("a", range(4))
    r.step()
    r.add("b", range(10, 35))
    plan = plan_of(r)
    assert [s.request_id for s in plan.sequences] == ["a", "b"]
    assert plan.query_lens.tolist() == [1, 9] and plan.start_positions.tolist() == [4, 0]
    assert plan.token_ids.tolist() == [r.tokens["a"][-1], *range(10, 19)]
    assert plan.sample_indices.tolist() == [0]
    assert (plan.rows.dtype, plan.token_ids.dtype, plan.sample_indices.dtype) == (np.int32, np.int64, np.int32)
    settle(r, plan)
    assert plan_of(r).start_positions.tolist() == [5, 9]


def test_without_chunked_prefill_a_prompt_waits_for_a_whole_step(rig: Rigs) -> None:
    r = rig(max_num_batched_tokens=10, chunked=False)
    r.add("a", range(7))
    r.add("b", range(5))
    assert plan_of(r).query_lens.tolist() == [7]


def test_without_chunked_prefill_a_prompt_larger_than_any_step_is_still_split(rig: Rigs) -> None:
    r = rig(max_num_batched_tokens=10, chunked=False)
    r.add("a", range(25))
    r.run()
    assert r.tokens["a"] == r.expected("a")


def test_first_come_first_served_nobody_overtakes(rig: Rigs) -> None:
    r = rig(num_blocks=8, max_num_batched_tokens=40)  # 7 blocks of 4
    r.add("a", range(12), greedy(2))
    r.step()
    r.add("big", range(20, 44), greedy(2))
    r.add("small", range(30, 32), greedy(2))
    assert [s.request_id for s in plan_of(r).sequences] == ["a"]


def test_lower_priority_value_goes_first(rig: Rigs) -> None:
    r = rig(max_num_seqs=1)
    r.add("later", range(4), priority=1)
    r.add("sooner", range(4), priority=0)
    assert plan_of(r).sequences[0].request_id == "sooner"


def test_the_youngest_is_preempted_and_comes_back_with_its_tokens(rig: Rigs) -> None:
    r = rig(num_blocks=8, max_num_batched_tokens=40, prefix_caching=False)
    r.add("old", range(8), greedy(16))
    r.add("young", range(20, 28), greedy(16))
    r.run()
    assert r.core.stats()["num_preemptions"] >= 1
    assert r.tokens["old"] == r.expected("old") and r.tokens["young"] == r.expected("young")
    ends = list(r.ends)
    assert ends == ["old", "young"]


def test_preempted_sequence_finds_its_own_blocks_again(rig: Rigs) -> None:
    r = rig(num_blocks=8, max_num_batched_tokens=40)
    r.add("old", range(8), greedy(13))
    r.add("young", range(20, 28), greedy(16))
    r.run()
    stats = r.core.stats()
    assert stats["num_preemptions"] == 1
    assert r.tokens["young"] == r.expected("young")
    without_preemption = (8 + 12) + (8 + 15)
    assert stats["num_scheduled_tokens"] - without_preemption < 12, "all it had was computed again"
    assert r.ends["young"].num_cached_tokens == 0  # what it lost and found again is no cached prompt


def test_stop_reasons(rig: Rigs) -> None:
    r = rig()
    r.add("length", range(4), greedy(5))
    r.run()
    third = r.tokens["length"][2]
    first = r.tokens["length"].index(third)
    r.add("token", range(4), greedy(5, stop_token_ids=(third,)))
    r.add("held", range(4), greedy(5, stop_token_ids=(third,), min_tokens=5))
    r.run()
    assert r.ends["length"].finish_reason == "length" and len(r.tokens["length"]) == 5
    assert (r.ends["token"].finish_reason, r.ends["token"].stop_token_id) == ("stop", third)
    assert r.tokens["token"] == r.tokens["length"][: first + 1]
    assert len(r.tokens["held"]) == 5 and third not in r.tokens["held"]


def test_eos_stops_without_a_stop_token(rig: Rigs) -> None:
    r = rig(max_num_seqs=1, max_model_len=64)
    for start in range(40):
        r.add(f"r{start}", [start, 1], SamplingParams(temperature=0.0, max_tokens=40))
    r.run()
    stopped = [end for end in r.ends.values() if end.finish_reason == "stop"]
    assert stopped and all(end.stop_token_id is None and r.tokens[end.request_id][-1] == 3 for end in stopped)


def test_context_length_ends_a_sequence(rig: Rigs) -> None:
    r = rig(max_model_len=20)
    r.add("a", range(12), greedy(100))
    r.add("b", range(12), SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True))
    r.run()
    assert len(r.tokens["a"]) == len(r.tokens["b"]) == 8
    assert r.ends["a"].finish_reason == r.ends["b"].finish_reason == "length"


def test_a_cache_that_just_holds_the_request_is_enough(rig: Rigs) -> None:
    r = rig(num_blocks=6)  # 5 blocks = 20 positions; the 21st token is never computed
    r.add("a", range(10), greedy(11))
    r.run()
    assert r.tokens["a"] == r.expected("a")


def test_depth_two_plans_ahead_with_tokens_on_the_device(rig: Rigs) -> None:
    r = rig(depth=2)
    r.add("a", range(4), greedy(3))
    first = plan_of(r)
    second = plan_of(r)
    assert r.scheduler.schedule() is None  # depth reached
    assert second.token_ids.tolist() == [-1] and second.start_positions.tolist() == [4]
    assert settle(r, first)[0].finish_reason is None
    third = plan_of(r)
    assert r.scheduler.schedule() is None
    settle(r, second)
    assert r.scheduler.schedule() is None, "its last token is in flight"
    assert settle(r, third)[0].finish_reason == "length"
    r.scheduler.check_integrity()


def test_depth_two_waits_where_the_next_token_needs_the_host(rig: Rigs) -> None:
    r = rig(depth=2)
    r.add("a", range(4), greedy(3, repetition_penalty=1.5))
    plan_of(r)
    assert r.scheduler.schedule() is None


def test_rows_and_blocks_come_back_when_the_last_step_in_flight_is_settled(rig: Rigs) -> None:
    r = rig(depth=2, max_num_seqs=1)
    r.add("a", range(4), greedy(30))
    first, second = plan_of(r), plan_of(r)
    r.core.abort("a")
    r.add("b", range(10, 14), greedy(2))
    settle(r, first)
    assert r.scheduler.table.num_free_rows == 0 and r.scheduler.blocks.counts[0].used == 2
    assert r.scheduler.schedule() is None
    assert settle(r, second) == []  # the extra token is discarded
    assert r.scheduler.table.num_free_rows == 1 and r.scheduler.blocks.counts[0].used == 0
    assert plan_of(r).sequences[0].request_id == "b"


def test_cancelled_steps_are_planned_again(rig: Rigs) -> None:
    r = rig(depth=2)
    r.add("a", range(4), greedy(5))
    plan_of(r)
    plan_of(r)
    r.scheduler.cancel_all()
    r.scheduler.check_integrity()
    r.run()
    assert r.tokens["a"] == r.expected("a")


def test_row_that_was_not_finite_fails_alone_and_is_not_cached(rig: Rigs) -> None:
    r = rig()
    r.add("bad", range(8))
    r.add("good", range(10, 18))
    plan = plan_of(r)
    result = r.executor.execute(plan)
    outputs = r.scheduler.update(plan, StepResult(plan.step_id, result.token_ids, failed={0: "not finite"}))
    assert (outputs[0].finish_reason, outputs[0].error) == ("error", "not finite")
    assert [o.request_id for o in outputs] == ["bad", "good"]
    assert r.scheduler.blocks.counts[0].cached == 0
    r.scheduler.check_integrity()


@pytest.mark.parametrize("budget", [3, 5, 16])
def test_prompt_logprobs_cover_the_prompt_once_whatever_the_chunks(rig: Rigs, budget: int) -> None:
    r = rig(max_num_seqs=2, max_num_batched_tokens=budget)
    prompt = [7, 8, 9, 10, 11, 12, 13, 14, 15]
    r.add("warm", prompt, greedy(2))
    r.run()
    r.add("a", prompt, greedy(3, prompt_logprobs=1, logprobs=2))
    outputs = [output for _ in range(12) for output in r.step() if output.request_id == "a"]
    scores = outputs[0].prompt_logprobs
    assert scores[0] is None and [s.token_id for s in scores[1:]] == prompt[1:]
    assert all(output.prompt_logprobs is None for output in outputs[1:])
    assert [o.logprobs[0].token_id for o in outputs] == r.tokens["a"] == r.expected("a")
    assert outputs[0].num_cached_tokens == 0


def test_prompt_logprobs_survive_a_preemption_in_the_middle(rig: Rigs) -> None:
    r = rig(num_blocks=9, max_num_seqs=2, max_num_batched_tokens=8)
    r.add("old", range(8), greedy(24))
    r.step()
    prompt = [p % 50 for p in range(100, 124)]
    r.add("young", prompt, greedy(2, prompt_logprobs=1))
    scores = []
    while r.core.has_work:
        scores += [o.prompt_logprobs for o in r.step() if o.request_id == "young" and o.prompt_logprobs]
    assert len(scores) == 1 and [s.token_id for s in scores[0][1:]] == prompt[1:]
    assert r.core.stats()["num_preemptions"] >= 1


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens 4 is less than max_num_seqs 8"):
        EngineLimits(max_num_seqs=8, max_num_batched_tokens=4, max_model_len=16)
    with pytest.raises(ConfigError, match="pipeline_depth"):
        EngineLimits(max_num_seqs=1, max_num_batched_tokens=4, max_model_len=16, pipeline_depth=0)
