"""Graphs that take more than their share are captured to a lesser extent, never past the cap."""

from __future__ import annotations

from typing import Any

import pytest

from brim.errors import MemoryBudgetError
from brim.platforms.scenario import scenario_of
from brim.worker.scripted_start import ScriptedStart, start_scripted


def start(graph_bytes: str, **settings: Any) -> ScriptedStart:
    """A model of one billion parameters on a device of 8 GiB, whose graphs take so much each."""
    document = {
        "title": "graphs",
        "sources": ["none"],
        "reported": "-",
        "device": {"like": "cuda", "total": "8GiB"},
        "model": {"shape": "llama-3.2-1b"},
        "settings": {"max_model_len": 4096, "max_num_seqs": 256, "max_num_batched_tokens": 2048, **settings},
        "consumers": [{"name": "graphs", "on": "graph", "times": "each", "bytes": graph_bytes}],
    }
    scenario = scenario_of(document, "test")
    return start_scripted(scenario)


def mode_of(found: ScriptedStart) -> tuple[str, str]:
    assert found.worker is not None, found.error
    graphs = found.worker.ready.committed.captured.graphs
    return graphs.mode, graphs.reason


def test_small_graphs_are_all_captured() -> None:
    assert mode_of(start("1MiB"))[0] == "FULL"


def test_decode_graphs_alone_where_all_are_too_large() -> None:
    found = start("20MiB", graph_mode="FULL_AND_PIECEWISE")
    mode, reason = mode_of(found)
    assert mode == "FULL_DECODE_ONLY" and "FULL_AND_PIECEWISE did not fit" in reason and "set aside" in reason
    assert found.worker is not None and found.worker.num_programs > 0
    assert found.device.ours["graphs"] == found.worker.num_programs * 20 << 20  # what did not fit was given back


def test_none_where_not_even_decode_fits_and_the_cap_was_never_passed() -> None:
    found = start("600MiB")
    assert mode_of(found)[0] == "NONE"
    assert found.device.ours["graphs"] == 0 and found.device.over_cap_bytes == 0


def test_strict_refuses_instead() -> None:
    found = start("600MiB", graph_mode="FULL", strict=True)
    assert isinstance(found.error, MemoryBudgetError) and found.error.ledger is not None
    assert "--graph-mode FULL" in str(found.error) and found.num_deaths == 0


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_a_mode_asked_for_gives_way_too(mode: str) -> None:
    assert mode_of(start("600MiB", graph_mode=mode))[0] == "NONE"
