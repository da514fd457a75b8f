"""Ranks as processes, over gloo: all take what each can give, a rank that fails says why, and one that dies is noticed."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from tests.e2e import rank_main
from tests.small_models import write_small_model

from brim.parallel.gloo_ranks import RankStore
from brim.units import MIB

pytestmark = pytest.mark.slow
PATIENCE_S = 120


@pytest.fixture(scope="module")
def processes() -> Iterator[ForkServerContext]:
    """Processes forked from one that has imported everything, so that torch is read once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([rank_main.__name__])
    yield context
    assert not multiprocessing.active_children()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("ranks") / "model")


def start_ranks(processes: ForkServerContext, model: Path, *ranks: dict[str, Any]) -> list[dict[str, Any]]:
    """How each rank ended; "killed" where by a signal. None outlives the call."""
    store = RankStore()
    common = {"size": len(ranks), "port": store.port, "timeout_s": 60.0, "model": str(model), "max_model_len": 256}
    started = []
    try:
        for index, rank in enumerate(ranks):
            here, there = processes.Pipe(duplex=False)
            asked = {**common, "index": index, "room_bytes": 64 * MIB, **rank}
            process = processes.Process(target=rank_main.main, args=(asked, there))
            process.start()
            there.close()
            started.append((process, here))
        return [_end_of(process, here) for process, here in started]
    finally:
        for process, here in started:
            process.kill()
            process.join()
            here.close()


def _end_of(process: Any, here: Any) -> dict[str, Any]:
    process.join(PATIENCE_S)
    assert process.exitcode is not None, "a rank waits for ever"
    return {"error": "killed"} if process.exitcode == -signal.SIGKILL else here.recv()


def test_four_ranks_take_what_the_poorest_can_give(processes: ForkServerContext, model: Path) -> None:
    rooms = (192, 96, 128, 160)  # a start in a fresh process takes some 46 MiB before the KV cache gets any
    found = start_ranks(processes, model, *({"room_bytes": room * MIB, "max_model_len": "auto"} for room in rooms))
    assert all("error" not in one for one in found), found
    for name in ("blocks", "capacity", "length"):
        assert len({str(one[name]) for one in found}) == 1, name
    (alone,) = start_ranks(processes, model, {"room_bytes": min(rooms) * MIB})
    assert abs(found[0]["blocks"][0] - alone["blocks"][0]) <= alone["blocks"][0] // 8, "the poorest alone would have had as many"
    assert all(one["over_bytes"] <= 0 for one in found)


@pytest.mark.parametrize("phase", ["open", "load", "reserve", "warm", "measure", "capture", "commit", "prove"])
def test_a_rank_that_fails_tells_the_other_why(processes: ForkServerContext, model: Path, phase: str) -> None:
    first, second = start_ranks(processes, model, {}, {"phase": phase, "how": "raise"})
    assert (second["error"], second["message"]) == ("ValueError", "scripted")
    assert (first["error"], first["message"]) == ("RankFailed", f"Rank 1 failed in the phase {phase}: ValueError: scripted.")


@pytest.mark.parametrize("dies", [0, 3])
def test_a_rank_that_dies_is_noticed_by_all(processes: ForkServerContext, model: Path, dies: int) -> None:
    fault = {"phase": "measure", "how": "kill"}
    found = start_ranks(processes, model, *(fault if index == dies else {} for index in range(4)))
    assert found.pop(dies) == {"error": "killed"}
    assert found == [{"error": "RankFailed", "message": f"Rank {dies} is gone: no word was left."}] * 3
