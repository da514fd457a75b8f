"""Chunks on their way from the engine's messages to those who wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tests.unit.server.letters import FIRST, LetterTools

from brim.engine.async_engine import AsyncEngine
from brim.engine.messages import AbortRequest, FromEngine, SequenceOutput, StepOutputs, ToEngine
from brim.engine.sampling_params import SamplingParams


class ScriptedSupervisor:
    """A ready engine that says what the test says."""

    state, reason, num_restarts = "ready", "", 0
    on_message: Callable[[FromEngine], None]
    on_down: Callable[[Any], None]

    def __init__(self) -> None:
        self.sent: list[ToEngine] = []

    def send(self, message: ToEngine) -> None:
        self.sent.append(message)

    def say(self, letter: int, finish_reason: Any = None) -> None:
        self.on_message(StepOutputs([SequenceOutput("r", [FIRST + letter], finish_reason)]))


def run(test: Callable[[AsyncEngine, ScriptedSupervisor], Any]) -> None:
    async def inside() -> None:
        supervisor = ScriptedSupervisor()
        supervised: Any = supervisor
        async with asyncio.timeout(10):
            await test(AsyncEngine(supervised, LetterTools()), supervisor)

    asyncio.run(inside())


def test_who_is_behind_takes_all_that_came_since_and_who_is_not_each_as_it_comes() -> None:
    async def test(engine: AsyncEngine, supervisor: ScriptedSupervisor) -> None:
        stream = engine.generate("r", [1], SamplingParams(max_tokens=9))
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        supervisor.say(1)
        assert [chunk.text for chunk in await first] == ["a"]
        for letter in (2, 3, 4):
            supervisor.say(letter)
        several = await anext(stream)
        assert [chunk.text for chunk in several] == ["b", "c", "d"]
        assert [chunk.usage.completion_tokens for chunk in several] == [2, 3, 4]
        supervisor.say(5, "length")
        assert [chunk.is_last for chunk in await anext(stream)] == [True]
        assert [chunks async for chunks in stream] == []
        assert engine.num_requests == 0

    run(test)


def test_a_waiting_stream_that_is_closed_aborts_and_later_words_go_nowhere() -> None:
    async def test(engine: AsyncEngine, supervisor: ScriptedSupervisor) -> None:
        waiting = asyncio.create_task(anext(engine.generate("r", [1], SamplingParams(max_tokens=9))))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        await asyncio.sleep(0)
        supervisor.say(1)
        assert supervisor.sent[-1] == AbortRequest("r")
        assert engine.num_requests == 0

    run(test)


def test_an_abort_wakes_who_waits() -> None:
    async def test(engine: AsyncEngine, supervisor: ScriptedSupervisor) -> None:
        stream = engine.generate("r", [1], SamplingParams(max_tokens=9))
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        supervisor.say(1)
        engine.abort("r")
        assert [chunk.finish_reason for chunk in await waiting] == [None, "abort"]

    run(test)
