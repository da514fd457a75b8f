"""A long prompt beside sequences that decode: on a device whose steps take a stated time, by a clock that moves with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from brim.engine.sampling_params import SamplingParams
from brim.engine.step import StepPlan, StepResult
from brim.errors import OutOfDeviceMemory

DECODE_S = 0.006
MOST = 2048
LONG = 12_000


class PacedDevice:
    """A rig whose steps take decode_s, fixed_s where there are prompt tokens, and token_s + context_s * context for each."""

    def __init__(self, make_rig: Callable[..., Any], *, depth: int = 1, **costs: float) -> None:
        self.now_s = 0.0
        self.costs = {"fixed_s": 0.0, "token_s": 25e-6, "context_s": 0.0, **costs}
        self.steps: list[tuple[int, int, float]] = []  # decodes, prompt tokens, seconds
        sizes = {"num_blocks": 20_000, "max_num_seqs": 16, "max_num_batched_tokens": MOST, "max_model_len": 16_000}
        self.rig = make_rig(**sizes, depth=depth, clock=lambda: self.now_s)
        self._free_s = 0.0
        self.rig.executor.submit = self.submit

    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Steps queue up; who waits for one waits until it has ended."""
        ends_s = self._free_s = max(self._free_s, self.now_s) + self.seconds(plan)

        def wait() -> StepResult:
            self.now_s = max(self.now_s, ends_s)
            return result

        result = self.rig.executor.execute(plan)
        return wait

    def seconds(self, plan: StepPlan) -> float:
        lens, starts = plan.query_lens.tolist(), plan.start_positions.tolist()
        chunks = [(count, start) for count, start in zip(lens, starts, strict=True) if count > 1]
        took_s = DECODE_S + (self.costs["fixed_s"] if chunks else 0.0)
        took_s += sum(count * (self.costs["token_s"] + self.costs["context_s"] * start) for count, start in chunks)
        self.steps.append((lens.count(1), sum(count for count, _ in chunks), took_s))
        return took_s

    def decode(self, count: int = 8, steps: int = 10) -> None:
        """So many sequences decode."""
        for index in range(count):
            self.rig.add(f"stream {index}", [7, 8, 9], SamplingParams(temperature=0.0, max_tokens=1000, ignore_eos=True))
        for _ in range(steps):
            self.rig.step()
        self.steps.clear()

    def answer(self, request_id: str, length: int) -> None:
        """A prompt, until its first token is there."""
        self.rig.add(request_id, [5] * length, SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
        while request_id not in self.rig.ends:
            self.rig.step()

    @property
    def prompt_steps(self) -> list[tuple[int, int, float]]:
        return [step for step in self.steps if step[1]]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("costs", [{}, {"context_s": 4e-9}, {"fixed_s": 0.002}, {"token_s": 10e-6, "fixed_s": 0.003}])
def test_streams_get_half_their_speed_or_more(rig: Callable[..., Any], depth: int, costs: dict[str, float]) -> None:
    device = PacedDevice(rig, depth=depth, **costs)
    device.decode()
    device.answer("long", LONG)
    steps = device.prompt_steps
    assert sum(tokens for _, tokens, _ in steps) == LONG and all(decodes == 8 for decodes, _, _ in steps)
    assert sum(seconds for _, _, seconds in steps) / len(steps) < 2 * DECODE_S
    assert max(seconds for _, _, seconds in steps[3:]) < 2.5 * DECODE_S, "also while it learns what a longer context costs"
    assert len(steps) < 2 * LONG * (0.025 + costs.get("context_s", 0) * 6e6) / (0.8 * 6 - costs.get("fixed_s", 0) * 1e3) + 10


def test_nobody_to_hold_up_nothing_held_back(rig: Callable[..., Any]) -> None:
    device = PacedDevice(rig)
    device.answer("long", LONG)
    assert [tokens for _, tokens, _ in device.prompt_steps] == [2048] * 5 + [LONG - 5 * 2048]


def test_prompts_that_fit_a_step_are_taken_whole(rig: Callable[..., Any]) -> None:
    device = PacedDevice(rig)
    device.decode()
    device.answer("fits", MOST - 8)
    assert [tokens for _, tokens, _ in device.prompt_steps] == [MOST - 8]


def test_steps_that_cost_much_however_small_still_move_the_prompt(rig: Callable[..., Any]) -> None:
    device = PacedDevice(rig, fixed_s=0.1)
    device.decode()
    device.answer("long", LONG)
    tokens = [tokens for _, tokens, _ in device.prompt_steps[5:-1]]
    assert min(tokens) >= 248, "what costs nearly nothing beside the least chunk is taken along"


@pytest.mark.parametrize("depth", [1, 2])
def test_a_host_that_was_busy_is_not_taken_for_a_slow_device(rig: Callable[..., Any], depth: int) -> None:
    """Taking a long prompt in holds the host up: the step before is noticed late, and seems to have been a long one."""
    device = PacedDevice(rig, depth=depth)
    device.decode(steps=40)
    device.rig.add("long", [5] * LONG, SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
    device.now_s += 0.1
    while "long" not in device.rig.ends:
        device.rig.step()
    assert max(seconds for _, _, seconds in device.prompt_steps) < 2.5 * DECODE_S


def test_requests_that_wait_quicken_the_pace(rig: Callable[..., Any]) -> None:
    device = PacedDevice(rig)
    device.decode()
    for index in range(3):
        device.rig.add(f"other {index}", [6] * LONG, SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
    device.answer("last", LONG)
    first, last = device.prompt_steps[5:8], device.prompt_steps[-4:-1]
    assert min(tokens for _, tokens, _ in first) > 2 * max(tokens for _, tokens, _ in last)


def test_a_step_that_failed_teaches_nothing(rig: Callable[..., Any]) -> None:
    device = PacedDevice(rig)
    device.rig.executor.faults[5] = OutOfDeviceMemory("scripted")
    device.decode()
    device.answer("long", LONG)
    steps = device.prompt_steps
    assert sum(seconds for _, _, seconds in steps) / len(steps) < 2 * DECODE_S
