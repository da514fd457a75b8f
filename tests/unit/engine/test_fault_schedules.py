"""500 random schedules of faults: every request gets exactly one end, nothing is lost, and the books agree after every step."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tests.unit.engine.test_engine_properties import WINDOWS, random_params, random_prompt
from tests.unit.server.letters import LetterTools

from brim.engine.completion import CompletionChunk
from brim.engine.messages import SequenceOutput
from brim.engine.output_processor import OutputProcessor
from brim.errors import DeviceLost, EngineError, OutOfDeviceMemory

NUM_SCHEDULES, NUM_PARTS = 500, 10
FAULTS: tuple[Callable[[], Exception], ...] = (
    lambda: OutOfDeviceMemory("scripted"),
    lambda: RuntimeError("scripted"),
    lambda: DeviceLost("scripted"),
)


class Front:
    """Requests on one side, engines that come and go on the other: what `AsyncEngine` and `Supervisor` do, without processes."""

    def __init__(self, rig: Callable[..., Any], rnd: random.Random) -> None:
        self._rig, self._rnd = rig, rnd
        self._settings = {
            "windows": rnd.choice(WINDOWS),
            "num_blocks": rnd.randrange(14, 60),
            "max_num_seqs": rnd.randrange(1, 6),
            "max_num_batched_tokens": rnd.randrange(6, 40),
            "max_model_len": 48,
            "chunked": rnd.random() < 0.8,
            "depth": rnd.randrange(1, 4),
            "check_interval_steps": rnd.randrange(1, 20),
            "unit_blocks": rnd.choice([1, 1, 4]),
        }
        self.processor = OutputProcessor(LetterTools())
        self.ends: Counter[str] = Counter()
        self.errors: dict[str, str | None] = {}
        self.num_engines = 0
        self.start()

    def start(self) -> None:
        """A new engine, with faults of its own."""
        rnd = self._rnd
        steps = rnd.sample(range(60), rnd.randrange(0, 6) if self.num_engines < 6 else 0)
        self.engine = self._rig(**self._settings, faults={step: rnd.choice(FAULTS)() for step in steps}, max_failed_steps=2)
        self.num_engines += 1

    def ask(self, name: str, prompt: list[int], index: int) -> None:
        """Send a request."""
        for message in self.processor.add(name, prompt, random_params(self._rnd, index), arrival_s=0.0):
            self.engine.core.add(message)

    def abort(self, name: str) -> None:
        """The client is gone: it hears nothing any more, which is its end."""
        for message in self.processor.abort(name):
            self.ends[name] += 1
            self.errors[name] = None
            self.engine.core.abort(message.request_id)

    def step(self) -> None:
        """One step; a lost device fails what is open, and the next engine begins."""
        rnd = self._rnd
        self.engine.executor.pressure = rnd.choice([-(1 << 30), -(1 << 30), -500, 0, 500])
        try:
            outputs: Sequence[SequenceOutput] = self.engine.core.step()
        except (DeviceLost, EngineError) as error:
            self.hear(self.processor.fail_all(str(error), "EngineDead"))
            self.start()
            return
        self.engine.scheduler.check_integrity()
        processed = self.processor.process(list(outputs))
        for message in processed.aborts:
            self.engine.core.abort(message.request_id)
        self.hear(processed.chunks)

    def hear(self, chunks: Sequence[CompletionChunk]) -> None:
        """Count ends."""
        for chunk in chunks:
            assert not self.ends[chunk.request_id], "an answer after the end"
            if chunk.is_last:
                self.ends[chunk.request_id] += 1
                self.errors[chunk.request_id] = chunk.error


def run_schedule(rig: Callable[..., Any], seed: int) -> Front:
    rnd = random.Random(seed)
    front = Front(rig, rnd)
    base = [rnd.randrange(50) for _ in range(40)]
    names = [f"r{index}" for index in range(rnd.randrange(1, 14))]
    for index, name in enumerate(names):
        front.ask(name, random_prompt(rnd, base), index)
        for _ in range(rnd.choice([0, 0, 1, 3])):
            front.step()
        if rnd.random() < 0.1:
            front.abort(rnd.choice(names[: index + 1]))
    for _ in range(3000):
        if not front.engine.core.has_work:
            break
        front.step()
    assert not front.engine.core.has_work, "somebody starves"
    assert dict(front.ends) == dict.fromkeys(names, 1)
    assert all(counts.used == 0 for counts in front.engine.scheduler.blocks.counts)
    return front


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_every_request_is_answered_once_whatever_fails(rig: Callable[..., Any], part: int) -> None:
    each = NUM_SCHEDULES // NUM_PARTS
    fronts = [run_schedule(rig, seed) for seed in range(part * each, (part + 1) * each)]
    assert any(front.num_engines > 1 for front in fronts), "no engine died: the schedules are too kind"
    assert any(error is None for front in fronts for error in front.errors.values())
