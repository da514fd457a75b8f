"""Ranks as processes, over gloo: all take what each can give, a rank that fails says why, and one that dies is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.small_models import write_small_model

from brim.parallel.gloo_ranks import free_port
from brim.units import MIB

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def start_ranks(model: Path, *ranks: dict[str, Any], timeout_s: float = 60.0) -> list[dict[str, Any]]:
    """How each rank ended; "killed" where by a signal. None outlives the call."""
    port = free_port()
    common = {"size": len(ranks), "port": port, "timeout_s": timeout_s, "model": str(model), "max_model_len": 256}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.rank_main", json.dumps({**common, "index": index, "room_bytes": 64 * MIB, **rank})],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        for index, rank in enumerate(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [{"error": "killed"} if p.returncode < 0 else json.loads(out) for p, out in zip(processes, outputs, strict=True)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_small_model(tmp_path / "model")


def test_four_ranks_take_what_the_poorest_can_give(model: Path) -> None:
    rooms = (96, 48, 64, 80)
    found = start_ranks(model, *({"room_bytes": room * MIB, "max_model_len": "auto"} for room in rooms))
    assert all("error" not in one for one in found), found
    for name in ("blocks", "capacity", "length"):
        assert len({json.dumps(one[name]) for one in found}) == 1, name
    (alone,) = start_ranks(model, {"room_bytes": 48 * MIB})
    assert abs(found[0]["blocks"][0] - alone["blocks"][0]) <= alone["blocks"][0] // 8, "the poorest alone would have had as many"
    assert all(one["over_bytes"] <= 0 for one in found)


@pytest.mark.parametrize("phase", ["load", "prove"])
def test_a_rank_that_fails_tells_the_other_why(model: Path, phase: str) -> None:
    first, second = start_ranks(model, {}, {"phase": phase, "how": "raise"})
    assert (second["error"], second["message"]) == ("ValueError", "scripted")
    assert (first["error"], first["message"]) == ("RankFailed", f"Rank 1 failed in the phase {phase}: ValueError: scripted.")


@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_dies_is_noticed(model: Path, dies: int) -> None:
    fault = {"phase": "measure", "how": "kill"}
    found = start_ranks(model, *(fault if index == dies else {} for index in range(2)))
    assert found[dies]["error"] == "killed"
    assert found[1 - dies]["error"] == "RankFailed" and f"Rank {dies}" in found[1 - dies]["message"]


def test_a_rank_that_never_comes_is_noticed(model: Path) -> None:
    ((only, _)) = start_ranks(model, {"size": 3}, {"size": 3, "index": 1}, timeout_s=5.0)
    assert only["error"] == "RankFailed" and "3 ranks did not come together" in only["message"]
