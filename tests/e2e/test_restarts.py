"""Engines that die, hang or run out of memory: started again without what killed them, and every request answered."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.conftest import ROOT
from tests.e2e.faulty_engine_main import PHASES
from tests.unit.server.letters import LetterFront, LetterTools

from brim.config.avoid import SUSPECTS
from brim.config.avoid_record import list_records
from brim.config.resolve import resolve
from brim.config.schema import Avoided
from brim.engine.async_engine import AsyncEngine
from brim.engine.sampling_params import SamplingParams
from brim.engine.start_watch import SilenceLimits
from brim.engine.supervisor import RestartPolicy, Supervisor
from brim.errors import BrimError, ConfigError, EngineError, OutOfDeviceMemory

LETTERS = ("-W", "error", "-m", "tests.e2e.faulty_engine_main")
SOON = SilenceLimits(dict.fromkeys(PHASES, 1.0))
AT_ONCE = RestartPolicy(first_pause_s=0.01)
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
AT_ONE_TIME = 3


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, short_folder: Path, tmp_path: Path) -> Iterator[None]:
    """A cache and a folder of sockets of its own; when the test ends no socket, pipe or folder is left."""
    with tempfile.TemporaryDirectory(dir=short_folder) as folder:
        sockets = Path(folder) / "s"
        sockets.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(sockets))
        monkeypatch.setenv("BRIM_CACHE_DIR", f"{folder}/cache")
        open_before = sum(1 for _ in Path("/proc/self/fd").iterdir())
        yield
        assert list(sockets.iterdir()) == []
        assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == open_before


class Recorder(Supervisor):
    """Remembers every process it started: what a process says before it dies may never arrive."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pids: list[int] = []

    async def _live(self, process: Any, started: Any) -> str:
        self.pids.append(process.pid)
        return await super()._live(process, started)


def supervisor_of(fault: dict[str, Any], main: tuple[str, ...] = LETTERS, **settings: Any) -> Recorder:
    """Over a process with this fault; it gives a sign of life every second."""
    command = ("env", f"PYTHONPATH={ROOT}", f"FAULT={json.dumps(fault)}", sys.executable, *main)
    config = resolve({"model": "letters", "step_timeout_seconds": 1, **settings})
    return Recorder(config, command=command, policy=AT_ONCE, silence=SOON)


def is_gone(group: int) -> bool:
    """No process is left in this group."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


async def all_of(works: list[Callable[[], Awaitable[None]]]) -> None:
    """Several at a time; the first failure is raised."""
    room = asyncio.Semaphore(AT_ONE_TIME)

    async def one(work: Callable[[], Awaitable[None]]) -> None:
        async with room:
            await work()

    await asyncio.gather(*(one(work) for work in works))


async def serves(supervisor: Supervisor, name: str = "a") -> None:
    """One request, from begin to end."""
    engine = AsyncEngine(supervisor, LetterTools())
    chunks = [chunk async for some in engine.generate(name, LetterFront().encode("hello"), GREEDY) for chunk in some]
    assert chunks[-1].is_last and chunks[-1].error is None


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "hang", "lost", "oom"])
def test_a_fault_in_any_phase_is_survived_or_said(how: str) -> None:
    """Where the phase has a suspect, one restart without it; else, and where the answer is that memory is short, an error."""

    async def die_in(phase: str) -> None:
        feature = SUSPECTS.get(phase, (None,))[0]
        supervisor = supervisor_of({"phase": phase, "how": how, "feature": feature}, compile=True, model=f"{phase}-{how}")
        try:
            if how == "oom" or feature is None:
                with pytest.raises(OutOfDeviceMemory if how == "oom" else BrimError):
                    await supervisor.start()
                assert supervisor.num_restarts == 0
            else:
                info = await supervisor.start()
                rungs = 2 if feature == "graphs" else 1
                assert (supervisor.num_restarts, len(supervisor.pids)) == (rungs, rungs + 1)
                assert [one[0] for one in info["avoided"]] == [feature]
                await serves(supervisor)
        finally:
            await supervisor.close()
        assert supervisor.pids and all(is_gone(pid) for pid in supervisor.pids)

    asyncio.run(all_of([lambda phase=phase: die_in(phase) for phase in PHASES]))  # type: ignore[misc]
    recorded = {record.identity["model"] for _, record in list_records()}
    assert recorded == (set() if how == "oom" else {f"{phase}-{how}" for phase in SUSPECTS})


def test_whole_graphs_that_kill_leave_the_pieces(capfd: pytest.CaptureFixture[str]) -> None:
    """And the next start does not try; --strict refuses, before and after it is known."""
    fault = {"phase": "capture", "how": "abort", "feature": "whole_graphs"}

    async def start(**settings: Any) -> tuple[int, list[list[str]]]:
        supervisor = supervisor_of(fault, **settings)
        try:
            info = await supervisor.start()
            return supervisor.num_restarts, info["avoided"]
        finally:
            await supervisor.close()

    with pytest.raises(
        EngineError, match=r"died while capturing graphs \(SIGABRT\), and --strict refuses.*--graph-mode PIECEWISE"
    ):
        asyncio.run(start(strict=True))
    assert list_records() == []
    capfd.readouterr()
    assert asyncio.run(start(graph_mode="FULL")) == (1, [["graphs", "PIECEWISE"]])
    assert (
        "brim: The engine died while capturing graphs (SIGABRT); starting again with graphs PIECEWISE at most. --strict refuses "
        "instead; brim doctor --forget clears it.\n" in capfd.readouterr().err
    )
    ((_, record),) = list_records()
    assert record.avoided == (Avoided("graphs", "PIECEWISE", "the engine died while capturing graphs (SIGABRT)"),)
    assert asyncio.run(start()) == (0, [["graphs", "PIECEWISE"]])
    assert asyncio.run(start(graph_mode="NONE", strict=True)) == (0, [])
    with pytest.raises(ConfigError, match="--strict refuses to start with graphs PIECEWISE at most, but in an earlier start"):
        asyncio.run(start(strict=True))


def test_a_start_that_dies_whatever_is_taken_away_fails_in_the_end() -> None:
    async def start() -> None:
        supervisor = supervisor_of({"phase": "prove", "how": "exit"}, compile=True)
        try:
            with pytest.raises(EngineError, match="could not start: it ended with status 9 while proving the worst steps"):
                await supervisor.start()
            assert supervisor.num_restarts == 5
        finally:
            await supervisor.close()

    asyncio.run(start())
    assert list_records() == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "hang", "lost", "oom", "bug"])
def test_a_fault_in_any_kind_of_step_leaves_no_request_unanswered(how: str, tmp_path: Path) -> None:
    """Requests in flight end, with an error where they must; then the engine, or its successor, serves."""

    async def fail_in(step: str) -> None:
        once = tmp_path / step
        supervisor = supervisor_of({"step": step, "how": how, "once": str(once)})
        first = (await supervisor.start())["pid"]
        engine = AsyncEngine(supervisor, LetterTools())
        ends: dict[str, list[str | None]] = {}

        async def ask(name: str, pause_s: float) -> None:
            await asyncio.sleep(pause_s)
            ends[name] = []
            try:
                async for chunks in engine.generate(name, LetterFront().encode(f"hello {name}" * 5), GREEDY):
                    ends[name] += [chunk.error for chunk in chunks if chunk.is_last]
            except BrimError as error:
                ends[name].append(str(error))

        try:
            async with asyncio.timeout(30):
                await asyncio.gather(*(ask(f"r{index}", index % 4 * 0.002) for index in range(24)))
                assert once.exists(), "no such step was run"
                while not engine.is_healthy:
                    await asyncio.sleep(0.01)
                await ask("later", 0)
        finally:
            await supervisor.close()
        assert len(ends) == 25 and all(len(found) == 1 for found in ends.values())
        assert ends["later"] == [None]
        said = [error for (error,) in ends.values() if error is not None]
        assert bool(said) == (how != "oom"), said
        assert supervisor.num_restarts == (1 if how in ("kill", "hang", "lost") else 0)
        assert is_gone(first)

    asyncio.run(all_of([lambda step=step: fail_in(step) for step in ("prefill", "decode", "mixed")]))  # type: ignore[misc]
