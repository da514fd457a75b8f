"""Whatever runs beside a request, however small the cache and whatever goes wrong: it gets the tokens it would get alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from brim.engine.sampling_params import SamplingParams
from brim.errors import OutOfDeviceMemory

WINDOWS = [(0,), (0, 6), (5,), (0, 9, 3), (0, 1), (0, 16)]

engines = st.fixed_dictionaries(
    {
        "windows": st.sampled_from(WINDOWS),
        "num_blocks": st.integers(14, 60),
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.integers(6, 40),
        "max_model_len": st.just(48),
        "chunked": st.booleans(),
        "depth": st.integers(1, 3),
        "prefix_caching": st.booleans(),
        "check_interval_steps": st.integers(1, 20),
        "unit_blocks": st.sampled_from([1, 1, 4]),
    }
)
SEEDS = st.integers(0, 1 << 30)


def random_params(rnd: random.Random, index: int) -> SamplingParams:
    max_tokens = rnd.randrange(1, 20)
    return SamplingParams(
        temperature=rnd.choice([0.0, 1.0]),
        seed=index + 1,
        max_tokens=max_tokens,
        min_tokens=rnd.randrange(0, max_tokens + 1) if rnd.random() < 0.3 else 0,
        ignore_eos=rnd.random() < 0.3,
        stop_token_ids=tuple(rnd.sample(range(50), 3)) if rnd.random() < 0.3 else (),
        repetition_penalty=1.1 if rnd.random() < 0.1 else 1.0,
        prompt_logprobs=1 if rnd.random() < 0.15 else None,
        logprobs=2 if rnd.random() < 0.15 else None,
    )


def random_prompt(rnd: random.Random, base: list[int]) -> list[int]:
    """A shared prefix and an own tail; sometimes shared to the end, sometimes the same blocks after another beginning."""
    shared = base[: rnd.choice([0, 8, 20, rnd.randrange(1, 30)])]
    if shared and rnd.random() < 0.2:
        return shared
    if rnd.random() < 0.2:
        shared = [rnd.choice([1, 2])] * 4 + base[:8]
    return shared + [rnd.randrange(50) for _ in range(rnd.randrange(1, 10))]


def run_workload(rig: Callable[..., Any], engine: dict[str, Any], seed: int, *, pressure: bool, faults: bool) -> Any:
    """Random requests that share prefixes, arriving and leaving at random steps."""
    rnd = random.Random(seed)
    broken = {rnd.randrange(0, 90, 2): OutOfDeviceMemory("scripted") for _ in range(rnd.randrange(1, 12))} if faults else {}
    r = rig(**engine, faults=broken)
    r.executor.pressure = -(1 << 30)
    base = [rnd.randrange(50) for _ in range(40)]
    num_requests = rnd.randrange(1, 14)
    num_aborts = 0
    for index in range(num_requests):
        r.add(f"r{index}", random_prompt(rnd, base), random_params(rnd, index), priority=rnd.choice([0, 0, 0, 1]))
        for _ in range(0 if pressure else rnd.choice([0, 0, 1, 3])):
            r.step()
        if rnd.random() < 0.15:
            num_aborts += 1
            r.core.abort(f"r{rnd.randrange(index + 1)}")
    for _ in range(40 if pressure else 0):
        r.executor.pressure = rnd.choice([-(1 << 30), -500, 0, 0, 500, 2000])
        r.step()
    r.run()
    return r


def check_tokens(r: Any) -> None:
    for request_id, end in r.ends.items():
        expected = r.expected(request_id)
        if end.finish_reason == "abort":
            assert r.tokens[request_id] == expected[: len(r.tokens[request_id])]
        else:
            assert end.error is None
            assert r.tokens[request_id] == expected, request_id
            ended_early = len(expected) < min(
                r.requests[request_id].params.max_tokens, 48 - len(r.requests[request_id].prompt_ids)
            )
            assert end.finish_reason == "stop" if ended_early else end.finish_reason in ("stop", "length")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(engine=engines, seed=SEEDS)
def test_every_request_gets_the_tokens_it_would_get_alone(rig: Callable[..., Any], engine: dict[str, Any], seed: int) -> None:
    check_tokens(run_workload(rig, engine, seed, pressure=False, faults=False))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(engine=engines, seed=SEEDS, faults=st.booleans())
def test_memory_pressure_and_out_of_memory_lose_no_request(
    rig: Callable[..., Any], engine: dict[str, Any], seed: int, faults: bool
) -> None:
    check_tokens(run_workload(rig, engine, seed, pressure=True, faults=faults))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(engine=engines, seed=SEEDS, step=st.integers(0, 30))
def test_a_failing_step_fails_only_its_own_sequences(
    rig: Callable[..., Any], engine: dict[str, Any], seed: int, step: int
) -> None:
    rnd = random.Random(seed)
    r = rig(**engine, faults={step: RuntimeError("scripted")})
    for index in range(10):
        r.add(f"r{index}", [rnd.randrange(50) for _ in range(rnd.randrange(1, 20))], random_params(rnd, index))
    r.run()
    failed = [request_id for request_id, end in r.ends.items() if end.finish_reason == "error"]
    assert len(failed) <= engine["max_num_seqs"]
    for request_id, end in r.ends.items():
        expected = r.expected(request_id)
        if request_id in failed:
            assert end.error_kind == "RequestFailed" and "scripted" in end.error
            assert r.tokens[request_id] == expected[: len(r.tokens[request_id])]
        else:
            assert r.tokens[request_id] == expected
