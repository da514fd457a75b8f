"""`brim plan`: tables of 80 columns, exit codes, several models and devices, the picture, --check."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from tests.unit.cli.conftest import Brim

from brim.cli.plan_plot import bars_of
from brim.platforms.scenario_shapes import SHAPES

WIDTH = 80


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIM_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Two folders that hold a config.json each, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("llama-3.1-8b", "qwen3-0.6b"):
        Path(name).mkdir()
        (Path(name) / "config.json").write_text(json.dumps(SHAPES[name]))
    return "llama-3.1-8b", "qwen3-0.6b"


def assert_fits_the_terminal(text: str) -> None:
    assert max(len(line) for line in text.splitlines()) <= WIDTH


def test_one_plan_in_full(brim_command: Brim, models: tuple[str, str]) -> None:
    end = brim_command("plan", models[0], "--device", "h100-80g", "--max-model-len", "8192")
    assert end.code == 0, end.err
    assert_fits_the_terminal(end.out)
    for words in (
        "62 requests of 8,192 tokens",
        "131,072 tokens, the model's own limit",
        "does not run yet",
        "Most is gained by",
    ):
        assert words in " ".join(end.out.split()), words
    assert "weights          model" in end.out and "--graph-mode NONE" in end.out


def test_a_plan_that_does_not_fit_says_what_does(brim_command: Brim, models: tuple[str, str]) -> None:
    end = brim_command("plan", models[0], "--device", "rtx4090-24g")
    assert end.code == 1
    assert_fits_the_terminal(end.out)
    assert "The model does not fit" in end.out and "--max-model-len" in end.out and "OVER THE CAP" in end.out


def test_json_has_every_figure(brim_command: Brim, models: tuple[str, str]) -> None:
    end = brim_command("plan", models[0], "--device", "cpu:64GiB", "--json")
    (plan,) = json.loads(end.out)["plans"]
    assert plan["fits"] and plan["memory"] == "enough" and plan["max_model_len"] == 4096
    assert sum(plan["bytes"].values()) == plan["held_bytes"] <= plan["cap_bytes"]
    assert {line["known_by"] for line in plan["plan"]["ledger"]} == {"computed", "measured", "predicted"}


def test_models_that_share_and_devices_side_by_side(brim_command: Brim, models: tuple[str, str]) -> None:
    end = brim_command("plan", *models, "--device", "h100-80g", "--device", "l40s-48g", "--max-model-len", "8192")
    assert end.code == 0, end.err
    assert_fits_the_terminal(end.out)
    assert end.out.count("brim serve") == 4 and "on l40s-48g: brim serve qwen3-0.6b --memory" in end.out
    side = brim_command("plan", models[0], "--device", "h100-80g", "--device", "rtx4090-24g")
    rows = [line.split() for line in side.out.splitlines() if line.startswith("llama-3.1-8b ")]
    assert side.code == 1 and [(row[1], row[-1]) for row in rows[:2]] == [("h100-80g", "measured"), ("rtx4090-24g", "fit")]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_over_settings_or_devices(brim_command: Brim, models: tuple[str, str], ending: str) -> None:
    end = brim_command("plan", models[1], "--device", "h100-80g", "--plot", f"one.{ending}", "--json")
    assert end.code == 0, end.err
    data = Path(f"one.{ending}").read_bytes()
    assert data.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    bars = bars_of(json.loads(end.out))
    assert [label for label, _, _ in bars][:2] == ["as it is", "--max-num-batched-tokens 4096"]
    two = brim_command("plan", models[1], "--device", "h100-80g", "--device", "b60", "--plot", "two.png", "--json")
    assert two.code == 0 and len(bars_of(json.loads(two.out))) == 2


def test_a_picture_needs_an_ending_and_matplotlib(
    brim_command: Brim, models: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "must end in .png" in brim_command("plan", models[1], "--device", "b60", "--plot", "one.gif").err
    really = builtins.__import__

    def without(name: str, *args: Any, **values: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return really(name, *args, **values)

    monkeypatch.setattr(builtins, "__import__", without)
    end = brim_command("plan", models[1], "--device", "b60", "--plot", "one.png")
    assert end.code == 1 and "brim[plot]" in end.err


def test_wrong_usage(brim_command: Brim, models: tuple[str, str]) -> None:
    assert brim_command("plan").code == 2
    unknown = brim_command("plan", models[0], "--device", "h1000")
    assert unknown.code == 1 and "h100-80g" in unknown.err
    absent = brim_command("plan", "./nowhere", "--device", "h100-80g")
    assert absent.code == 1 and "There is no model" in absent.err


def test_check_says_how_wrong_plans_were(brim_command: Brim, tmp_path: Path) -> None:
    row = {
        "format_version": 2, "written": "2026-01-01T00:00:00Z", "device": {"device": "A device"}, "memory": "max", "cap_bytes": 9,
        "kv": {"tokens": 1000}, "planned": {"cap_bytes": 9, "kv": {"tokens": 990}},
        "predicted_and_measured": [{"category": "graphs", "difference_bytes": -3 << 20}],
    }  # fmt: skip
    (tmp_path / "one.json").write_text(json.dumps(row))
    (tmp_path / "old.json").write_text("{}")
    end = brim_command("plan", "--check", str(tmp_path))
    assert end.code == 0, end.err
    assert_fits_the_terminal(end.out.replace(str(tmp_path), ""))
    assert "median 1.000 %, worst 1.000 %" in end.out and "-3.00 MiB" in end.out and "1 file of an older version" in end.out
    assert json.loads(brim_command("plan", "--check", str(tmp_path), "--json").out)["skipped"] == ["old.json"]
    assert brim_command("plan", "--check", str(tmp_path / "none")).code == 1


def test_plan_takes_no_weights_and_serve_says_the_same(brim_command: Brim, models: tuple[str, str]) -> None:
    """The command that a plan prints for a share is understood by serve's own flags."""
    from brim.cli.options import build_config

    end = brim_command("plan", *models, "--device", "h100-80g", "--json", "--max-model-len", "8192")
    for plan in json.loads(end.out)["plans"]:
        config = build_config(plan["model"], {"memory": plan["memory"]})
        assert config.memory.memory is not None and config.memory.memory.num_bytes == plan["share_bytes"]
