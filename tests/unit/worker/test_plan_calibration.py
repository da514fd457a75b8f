"""Profiles from measured starts: what the figures are, and that plans made with them hold what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from brim.config.resolve import resolve
from brim.errors import DeviceError
from brim.planning import calibrate, plan_starts
from brim.platforms.profile import DeviceProfile, find_profile
from brim.units import GIB, MIB
from brim.worker import plan_calibration
from brim.worker.plan_calibration import CalibrationStart, MeasuredStart, fit_graphs, profile_from, start_json, start_of_json

START = MeasuredStart(
    device="Some Device 12", description="driver 1", kernels="triton", host_memory=False, virtual_memory=True, graphs=True,
    dtypes=("bfloat16", "float32"), total_bytes=12 * GIB, outside_bytes=8 * MIB, granularity_bytes=2 * MIB, num_cores=40,
    context_bytes=400 * MIB, opening_bytes=120 * MIB, kernel_bytes=4 * MIB, left_bytes=11 * MIB, graph_bytes=0, num_layers=4,
    num_whole=0, num_pieces=0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIM_CACHE_DIR", str(tmp_path / "cache"))


def graphs(layers: int, whole: int, pieces: int, num_bytes: int) -> MeasuredStart:
    return replace(START, num_layers=layers, num_whole=whole, num_pieces=pieces, graph_bytes=num_bytes)


def test_graph_figures_come_back_from_what_they_made() -> None:
    a_layer, a_step, a_piece = 30 << 10, 100 << 10, 130 << 10
    starts = [
        graphs(4, 35, 0, 35 * (a_step + 4 * a_layer)),
        graphs(12, 35, 0, 35 * (a_step + 12 * a_layer)),
        graphs(12, 4, 0, 4 * (a_step + 12 * a_layer)),
        graphs(12, 0, 104, 104 * a_piece),
    ]
    found = fit_graphs(starts)
    assert found == {
        "graph_whole_layer_bytes": a_layer, "graph_whole_bytes": a_step, "graph_piece_bytes": a_piece, "graph_fixed_bytes": 0,
    }  # fmt: skip
    assert fit_graphs([START]) == {}


@pytest.mark.parametrize("granule", [MIB, 2 * MIB, 5 * MIB])
def test_plans_are_never_below_what_captures_took(granule: int) -> None:
    def held(num_bytes: int) -> int:
        return -(-num_bytes // granule) * granule

    starts = [
        graphs(4, 35, 0, held(9 * MIB)), graphs(12, 35, 0, held(20 * MIB)), graphs(12, 4, 0, held(3 * MIB)),
        graphs(12, 0, 104, held(13 * MIB)),
    ]  # fmt: skip
    costs = profile_from(starts, "today").costs
    for one in starts:
        assert costs.graph_bytes(one.num_whole, one.num_pieces, one.num_layers) >= one.graph_bytes


def test_the_figures_of_an_accelerator() -> None:
    profile = profile_from([START, replace(START, opening_bytes=122 * MIB, left_bytes=13 * MIB)], "today")
    assert profile.name == "some-device-12-12g" and profile.devices == ("Some Device 12",)
    assert profile.is_measured
    assert profile.costs.of("context_bytes") == 400 * MIB
    assert profile.costs.of("library_bytes") == 118 * MIB
    assert profile.costs.of("rounding_bytes") == 26 * MIB
    assert "calibrate, today" in profile.costs.figure("library_bytes").source
    with pytest.raises(DeviceError, match="nothing was measured"):
        profile_from([], "today")


def test_a_known_device_keeps_its_name() -> None:
    assert profile_from([replace(START, device="NVIDIA H100 80GB HBM3")], "today").name == "h100-80g"
    assert start_of_json(start_json(START)) == START


def test_this_machine_is_measured_and_planned_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real starts, as `brim doctor --calibrate` makes them, fewer of them."""
    monkeypatch.setattr(plan_calibration, "HOST_STARTS", (CalibrationStart(2, 4, "FULL_DECODE_ONLY"),))
    found = calibrate(tmp_path / "mine.toml", "cpu", lambda progress: None)
    assert found["starts"] == 2 and not found["failures"]
    profile: DeviceProfile = find_profile(str(tmp_path / "mine.toml"))
    assert profile.host_memory and profile.kernels in ("native", "torch") and profile.is_measured
    assert profile.costs.of("context_bytes") > 64 * MIB
    model = tmp_path / "config.json"
    model.write_text(json.dumps(plan_calibration.FIRST_START.model))
    config = resolve({"model": str(model), "memory": "1GiB", "max_model_len": 1024})
    (plan,) = plan_starts([config], [found["file"]])["plans"]
    assert plan["fits"] and plan["bytes"]["context"] == profile.costs.of("context_bytes")
