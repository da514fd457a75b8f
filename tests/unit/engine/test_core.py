from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from brim.engine.core import draw_seed
from brim.engine.messages import AddRequest
from brim.engine.sampling_params import SamplingParams
from brim.errors import DeviceLost, EngineError, OutOfDeviceMemory

Rigs = Callable[..., Any]
SPARE = -(1 << 30)


def greedy(max_tokens: int = 8, **more: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **more})


@pytest.mark.parametrize(
    ("prompt", "params", "kind", "words"),
    [
        ([], {}, "InvalidParameter", "at least one token"),
        ([1, 50], {}, "InvalidParameter", "Token id 50 is outside the vocabulary (0 to 49)"),
        ([-1], {}, "InvalidParameter", "Token id -1"),
        ([1, 1 << 64], {}, "InvalidParameter", "A token id is outside the vocabulary (0 to 49)"),
        ([1, None], {}, "InvalidParameter", "must be a list of token ids"),
        ([1, [2]], {}, "InvalidParameter", "must be a list of token ids"),
        ([1] * 64, {}, "PromptTooLong", "64 tokens; with at least one new token it passes the context length of 64"),
        ([1] * 41, {}, "PromptTooLong", "needs 11 blocks of 4 tokens for full attention, and the KV cache has 10"),
        ([1] * 30, {"max_tokens": 20}, "InvalidParameter", "30 prompt tokens + 19 new tokens) needs 13 blocks"),
        ([1], {"stop_token_ids": (99,)}, "InvalidParameter", "stop_token_ids names token 99"),
        ([1], {"logit_bias": {50: 1.0}}, "InvalidParameter", "logit_bias names token 50"),
    ],
)
def test_wrong_requests_are_answered_and_others_go_on(
    rig: Rigs, prompt: list[int], params: dict[str, Any], kind: str, words: str
) -> None:
    r = rig(num_blocks=11)
    r.add("good", range(6))
    r.add("wrong", prompt, greedy(**params))
    r.run()
    wrong = r.ends["wrong"]
    assert (wrong.finish_reason, wrong.error_kind) == ("error", kind) and words in wrong.error
    assert r.tokens["good"] == r.expected("good")
    assert r.core.stats()["num_refused"] == 1


def test_max_tokens_none_takes_what_the_cache_holds(rig: Rigs) -> None:
    r = rig(num_blocks=6)
    r.add("a", range(10), SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True))
    r.run()
    assert len(r.tokens["a"]) == 11  # 20 positions, and one token that is never computed


def test_request_id_in_use(rig: Rigs) -> None:
    r = rig()
    r.add("a", range(4))
    r.core.add(r.requests["a"])
    outputs = r.core.step()
    assert [o.finish_reason for o in outputs] == ["error", None] and "in use" in outputs[0].error


def test_abort_at_any_time(rig: Rigs) -> None:
    r = rig(max_num_seqs=1, depth=2)
    for name in ("running", "waiting", "other"):
        r.add(name, range(6), greedy(10))
    r.step()
    r.core.abort("running")
    r.core.abort("waiting")
    r.core.abort("unknown")
    r.run()
    assert r.ends["running"].finish_reason == r.ends["waiting"].finish_reason == "abort"
    assert r.tokens["other"] == r.expected("other")


def test_drain_refuses_new_requests_and_finishes_old_ones(rig: Rigs) -> None:
    r = rig()
    r.add("old", range(4))
    r.core.drain()
    r.add("new", range(4))
    r.run()
    assert r.tokens["old"] == r.expected("old")
    assert "shutting down" in r.ends["new"].error


def test_seeds_are_drawn_from_the_engines_seed(rig: Rigs) -> None:
    drawn = {draw_seed(seed, counter) for seed in range(20) for counter in range(50)}
    assert len(drawn) == 1000 and all(-(1 << 63) <= seed < 1 << 63 for seed in drawn)
    tokens = []
    for _ in range(2):
        r = rig()
        r.add("a", range(4), SamplingParams(max_tokens=8, ignore_eos=True))
        r.add("b", range(4), SamplingParams(max_tokens=8, ignore_eos=True))
        r.run()
        tokens.append(r.tokens)
    assert tokens[0] == tokens[1] and tokens[0]["a"] != tokens[0]["b"]


@pytest.mark.parametrize("depth", [1, 2])
def test_out_of_memory_shrinks_retries_and_grows_back(rig: Rigs, depth: int) -> None:
    r = rig((0, 6), num_blocks=40, depth=depth, faults={4: OutOfDeviceMemory("scripted")}, check_interval_steps=3)
    r.executor.pressure = SPARE
    for index in range(4):
        r.add(f"r{index}", range(index, index + 12), greedy(20))
    while not r.core.stats()["num_out_of_memory"]:
        r.step()
    assert all(count < 40 for count in r.executor.committed) and r.executor.committed == r.scheduler.blocks.num_blocks
    r.run()
    assert all(r.tokens[name] == r.expected(name) for name in r.requests)
    assert r.executor.committed == (40, 40)
    memory = r.core.memory_stats()
    assert memory["groups"][0]["num_blocks"]["uncommitted"] == 0


def test_out_of_memory_preempts_where_live_blocks_do_not_fit(rig: Rigs) -> None:
    faults = {step: OutOfDeviceMemory("scripted") for step in range(6, 9)}
    r = rig(num_blocks=17, max_num_batched_tokens=64, faults=faults)
    r.executor.pressure = SPARE
    for index in range(4):
        r.add(f"r{index}", range(index, index + 12), greedy(12))
    r.run()
    assert r.core.stats()["num_preemptions"] >= 1
    assert all(r.tokens[name] == r.expected(name) for name in r.requests)


def test_memory_that_never_comes_fails_the_step_not_the_engine(rig: Rigs) -> None:
    r = rig(max_num_seqs=1, faults=dict.fromkeys(range(40), OutOfDeviceMemory("scripted")))
    r.add("a", range(4))
    r.step()
    assert r.ends["a"].error_kind == "RequestFailed" and "scripted" in r.ends["a"].error


def test_pressure_gives_bytes_back_and_takes_them_again(rig: Rigs) -> None:
    r = rig(num_blocks=40, check_interval_steps=2, unit_blocks=4)
    r.add("a", range(8), greedy(30))
    for _ in range(3):
        r.step()
    r.executor.pressure = 12 * 64
    for _ in range(3):
        r.step()
    assert r.executor.committed == (28,) == r.scheduler.blocks.num_blocks
    r.executor.pressure = 1 << 30  # more than there is: what a request of full length needs is kept
    for _ in range(6):
        r.step()
    assert r.executor.committed == (20,)
    r.executor.pressure = SPARE
    r.run()
    assert r.executor.committed == (40,) and r.tokens["a"] == r.expected("a")


def test_looking_at_the_device_leaves_steps_in_flight(rig: Rigs) -> None:
    """Waiting for them each time would leave the device idle; only blocks that change hands are worth it."""
    r = rig(num_blocks=60, depth=2, check_interval_steps=3)
    r.add("a", [5] * 8, SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    in_flight, changed, was = [], [], r.executor.pressure_bytes

    def look() -> int:
        in_flight.append(len(r.core._in_flight))
        return int(was())

    r.executor.pressure_bytes = look
    resize = r.executor.set_committed_blocks

    def change(counts: tuple[int, ...]) -> tuple[int, ...]:
        changed.append(len(r.core._in_flight))
        return tuple(resize(counts))

    r.executor.set_committed_blocks = change
    for _ in range(20):
        r.step()
    assert len(in_flight) >= 4 and min(in_flight) > 0 and not changed
    r.executor.pressure = 10 * r.executor.layout.groups[0].block_bytes
    r.run()
    assert changed and not any(changed)


def test_pressure_below_one_unit_of_the_device_is_relieved_too(rig: Rigs) -> None:
    r = rig(num_blocks=40, check_interval_steps=2, unit_blocks=16)
    r.add("a", range(8), greedy(20))
    for _ in range(3):
        r.step()
    r.executor.pressure = 64  # one block; memory goes back sixteen at a time
    for _ in range(3):
        r.step()
    assert r.executor.committed == (32,) == r.scheduler.blocks.num_blocks
    r.executor.pressure = SPARE
    r.run()
    assert r.tokens["a"] == r.expected("a")


def test_request_that_no_longer_fits_is_told_so(rig: Rigs) -> None:
    r = rig(num_blocks=16, check_interval_steps=100, faults={1: OutOfDeviceMemory("scripted")})
    r.add("short", range(4), greedy(4))
    r.executor.pressure = 1 << 30
    for _ in range(3):
        r.step()
    r.add("long", range(40), greedy(8))
    r.run()
    assert r.tokens["short"] == r.expected("short")
    assert r.ends["long"].error_kind == "OutOfDeviceMemory" and "40 tokens" in r.ends["long"].error


def test_a_request_after_pressure_while_idle_is_served(rig: Rigs) -> None:
    r = rig(num_blocks=40)
    r.executor.pressure = 1 << 30
    for _ in range(5):
        r.core.tend()
    assert r.executor.committed < (40,)
    r.add("long", range(40), greedy(24))
    r.run()
    assert r.tokens["long"] == r.expected("long")


def test_blocks_that_cannot_go_back_stay(rig: Rigs) -> None:
    """On a static arena giving blocks up gains the device nothing."""
    r = rig(num_blocks=40, check_interval_steps=1, faults={2: OutOfDeviceMemory("scripted")})
    r.executor.gives_back = False
    r.executor.pressure = 1 << 30
    r.core.tend()
    r.add("a", range(8), greedy(20))
    r.run()
    assert r.executor.committed == (40,) and r.tokens["a"] == r.expected("a")


def test_steps_that_keep_failing_end_the_engine(rig: Rigs) -> None:
    r = rig(max_num_seqs=1, faults=dict.fromkeys(range(40), ValueError("scripted")), max_failed_steps=3)
    for index in range(5):
        r.add(f"r{index}", range(4))
    r.step()
    r.step()
    assert [end.error_kind for end in r.ends.values()] == ["RequestFailed"] * 2
    with pytest.raises(EngineError, match="3 steps failed in a row, the last with: scripted"):
        r.step()


def test_a_lost_device_propagates(rig: Rigs) -> None:
    r = rig(faults={0: DeviceLost("gone")})
    r.add("a", range(4))
    with pytest.raises(DeviceLost):
        r.step()


def test_statistics_name_every_block(rig: Rigs) -> None:
    r = rig((0, 6), num_blocks=30)
    r.add("a", range(13), greedy(4))
    r.step()
    group = r.core.memory_stats()["groups"][0]
    assert group["num_blocks"] == {"free": 25, "used": 4, "cached": 0, "uncommitted": 0, "total": 29}
    assert group["num_tokens"]["used"] == 16 and group["committed_bytes"] == 30 * 64
    r.run()
    r.add("b", range(13), greedy(4))
    r.run()
    stats = r.core.stats()
    assert (stats["num_prefix_hit_tokens"], stats["num_prefix_query_tokens"]) == (12, 26)
    assert (stats["num_output_tokens"], stats["running"], stats["waiting"]) == (8, 0, 0)
    assert r.ends["b"].num_cached_tokens == 12


def test_step_without_work_is_empty_and_close_reaches_the_executor(rig: Rigs) -> None:
    r = rig()
    assert not r.core.has_work and r.core.step() == []
    r.core.close()
    assert r.executor.closed


def test_messages_round_trip() -> None:
    import msgspec

    request = AddRequest("a", [1, 2], greedy(logit_bias={3: 1.5}, stop=("x",)), 1.0)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=AddRequest) == request
