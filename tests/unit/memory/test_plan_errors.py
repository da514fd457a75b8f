"""The distribution of plan errors over stored certificates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from brim.errors import ConfigError
from brim.memory.plan_errors import plan_errors
from brim.units import MIB


def write(folder: Path, name: str, predicted: int, real: int, device: str = "a", **changes: Any) -> None:
    found = {
        "format_version": 2,
        "written": "2026-01-01T00:00:00Z",
        "device": {"device": device},
        "memory": "max",
        "cap_bytes": 100,
        "kv": {"tokens": real},
        "planned": {"cap_bytes": 90, "kv": {"tokens": predicted}},
        "predicted_and_measured": [{"category": "graphs", "difference_bytes": (real - predicted) * MIB}],
        **changes,
    }
    (folder / f"{name}.json").write_text(json.dumps(found))


def test_median_and_worst_of_each_device(tmp_path: Path) -> None:
    for name, real in (("one", 100), ("two", 99), ("three", 110)):
        write(tmp_path, name, 100, real)
    write(tmp_path, "other", 100, 80, device="b")
    found = plan_errors(tmp_path)
    first = next(device for device in found["devices"] if device["device"] == "a")
    assert first["starts"] == 3 and first["worst_file"] == "three.json"
    assert first["median_error"] == pytest.approx(1 / 99) and first["worst_error"] == pytest.approx(10 / 110)
    assert first["gave_fewer_tokens"] == 1
    assert first["lines"] == [{"category": "graphs", "starts": 3, "median_bytes": 0, "worst_bytes": 10 * MIB}]
    second = next(device for device in found["devices"] if device["device"] == "b")
    assert second["worst_error"] == pytest.approx(20 / 80)
    assert {one["error"] for one in found["starts"]} == {0.0, -1 / 99, 10 / 110, -20 / 80}


def test_what_is_no_certificate_of_this_version_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, "old", 1, 1, format_version=1)
    write(tmp_path, "odd", 1, 1, kv="none")
    (tmp_path / "half.json").write_text("{")
    found = plan_errors(tmp_path)
    assert found["starts"] == [] and found["devices"] == []
    assert found["skipped"] == ["half.json", "odd.json", "old.json"]


def test_no_folder_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="start a model"):
        plan_errors(tmp_path / "none")
