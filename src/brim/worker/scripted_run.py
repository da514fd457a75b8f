"""Runs a scenario: starts it as often as it says, serves its script, and has it judged. Owns what is served."""

from __future__ import annotations

import time
from collections.abc import Callable

from brim.config.model_source import ModelSource
from brim.config.schema import Avoided, BrimConfig
from brim.engine.core import EngineCore
from brim.engine.messages import AddRequest, SequenceOutput
from brim.engine.sampling_params import SamplingParams
from brim.engine.step import Executor
from brim.errors import BrimError
from brim.platforms.base import Platform
from brim.platforms.scenario import Scenario
from brim.worker.device_worker import DeviceWorker
from brim.worker.rank_group import RankGroup
from brim.worker.scripted_start import start_scripted
from brim.worker.scripted_verdict import RunResult, Served, judge_device, judge_end, judge_refusal, judge_served, note_start

_MOST_STEPS = 5000
CoreOver = Callable[[BrimConfig, Platform, DeviceWorker, ModelSource, Executor], EngineCore]


def run_scenario(scenario: Scenario, core_over: CoreOver) -> tuple[RunResult, ...]:
    """All starts of the scenario on one machine, one after the other; a later one knows what ended an earlier one."""
    results: list[RunResult] = []
    for number in range(scenario.starts):
        known = results[-1].start.avoided if results else ()
        result = run_once(scenario, core_over, is_first=number == 0, known=known)
        if results and result.start.num_deaths:
            result.wrong.append("it died again of what ended the start before")
        if results and scenario.expect.same_as_before and result.kv_tokens != results[0].kv_tokens:
            result.wrong.append(f"{result.kv_tokens:,} KV tokens, but {results[0].kv_tokens:,} at the first start")
        results.append(result)
    return tuple(results)


def run_once(scenario: Scenario, core_over: CoreOver, *, is_first: bool, known: tuple[Avoided, ...] = ()) -> RunResult:
    """One start of the scenario and what it serves, judged. known: what an earlier start recorded."""
    started = time.perf_counter()
    start = start_scripted(scenario, is_first=is_first, avoided=known)
    result = RunResult(start, 0.0)
    if start.worker is None:
        judge_refusal(scenario, result)
    else:
        note_start(scenario, result)
        _serve(scenario, result, core_over)
        judge_device(scenario, result)
        for one in start.all_ranks:
            assert one.worker is not None, "all ranks start, or none"
            one.worker.close()
        judge_end(result)
    result.seconds = time.perf_counter() - started
    return result


def _serve(scenario: Scenario, result: RunResult, core_over: CoreOver) -> None:
    """All requests at once, step by step; each step is a moment of the script."""
    start, script, served = result.start, scenario.serving, result.served
    assert start.worker is not None and start.platform is not None, "it started"
    workers = [one.worker for one in start.all_ranks if one.worker is not None]
    executor = workers[0] if len(workers) == 1 else RankGroup(workers)
    core = core_over(start.config, start.platform, start.worker, start.source, executor)
    params = SamplingParams(
        temperature=script.temperature,
        top_p=script.top_p,
        max_tokens=script.output,
        ignore_eos=True,
        logprobs=script.logprobs,
        prompt_logprobs=script.prompt_logprobs,
    )
    for one in start.all_ranks:
        one.device.enter("serve")
    open_requests = set()
    for number in range(script.requests):
        prompt = [(number * 31 + place) % 1000 for place in range(script.prompt)]
        core.add(AddRequest(str(number), prompt, params, 0.0))
        open_requests.add(str(number))
    try:
        while core.has_work and served.num_steps < _MOST_STEPS:
            _note_outputs(core.step(), served, open_requests)
            served.num_steps += 1
            for one in start.all_ranks:
                one.device.next_step()
    except BrimError as error:
        served.errors.append(f"{type(error).__name__}: {error}")
    served.num_unanswered = len(open_requests)
    served.num_shrinks, served.num_grows = core.guard.num_shrinks, core.guard.num_grows
    judge_served(scenario, result)


def _note_outputs(outputs: list[SequenceOutput], served: Served, open_requests: set[str]) -> None:
    for output in outputs:
        served.num_tokens += len(output.new_token_ids)
        if output.error is not None:
            served.errors.append(output.error)
        if output.finish_reason is not None:
            open_requests.discard(output.request_id)
