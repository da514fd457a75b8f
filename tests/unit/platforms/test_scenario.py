"""Reading scenarios: every mistake names the file, the table and the key."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from brim.errors import ConfigError
from brim.platforms import scenario as module
from brim.platforms.scenario import (
    Consumer,
    DeviceScript,
    Expect,
    Fault,
    Host,
    Neighbour,
    RankChange,
    Readings,
    Serving,
    read_scenario,
    scenario_of,
)
from brim.platforms.scenario_shapes import SHAPES
from brim.units import GIB, MIB

DOCUMENTATION = Path(__file__).parents[3] / "docs" / "scenarios.md"


def document(**changes: Any) -> dict[str, Any]:
    return {
        "title": "t",
        "sources": ["s"],
        "reported": "-",
        "device": {"like": "cuda"},
        "model": {"shape": "qwen3-0.6b"},
        **changes,
    }


def test_sizes_are_texts_or_numbers_and_the_ending_may_be_left_out() -> None:
    consumer = {"name": "a", "on": "sort", "per_row": "1MiB"}
    found = scenario_of(document(device={"total": "24GiB", "context_bytes": 5}, consumers=[consumer]), "f")
    assert (found.device.total_bytes, found.device.context_bytes, found.consumers[0].per_row_bytes) == (24 * GIB, 5, MIB)


def test_a_shape_can_be_changed() -> None:
    found = scenario_of(document(model={"shape": "qwen3-0.6b", "num_hidden_layers": 2}), "f")
    assert found.model["num_hidden_layers"] == 2 and found.model["hidden_size"] == SHAPES["qwen3-0.6b"]["hidden_size"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"devise": {}}, r"unknown key 'devise'.*device"),
        ({"device": {"like": "tpu"}}, r"'tpu' is not one of cuda, rocm, xpu, cpu"),
        ({"device": {"total": "many"}}, r"f device total: .*many"),
        ({"device": {"total": True}}, r"must be a size"),
        ({"device": {"graphs": 1}}, r"must be of type bool"),
        ({"device": []}, r"must be a table"),
        ({"model": None}, r"\[model\] is missing"),
        ({"model": {"shape": "llama-3.1-8"}}, r"shape 'llama-3.1-8' is not known.*llama-3.1-8b"),
        ({"neighbours": [{"name": "a", "bytes": 1, "at": "comit"}]}, r"'comit' is no phase.*commit"),
        ({"consumers": [{"name": "a", "on": "sort", "only_in": ["never"]}]}, r"consumer 'a': 'never' is no phase"),
        ({"consumers": [{"on": "sort"}]}, r"'name' is missing"),
        ({"first_start_only": ["b"]}, r"names 'b', which is no consumer"),
        ({"expect": {"reason": "("}}, r"reason is not a pattern"),
        ({"sources": "one"}, r"must be a list of texts"),
    ],
)
def test_a_mistake_is_one_clear_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        scenario_of(document(**changes), "f")
    assert re.search(said, str(caught.value)) and str(caught.value).startswith("f")


@pytest.mark.parametrize("content", [b"title = ", b"\xff\xfe"])
def test_what_is_no_toml_is_said(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.toml is not valid TOML"):
        read_scenario(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_scenario(tmp_path / "b.toml")


@pytest.mark.parametrize("cls", [DeviceScript, Readings, Host, Neighbour, Consumer, Fault, Serving, Expect, RankChange])
def test_the_documentation_names_every_key(cls: type) -> None:
    text = DOCUMENTATION.read_text(encoding="utf-8")
    names = {field.name for field in fields(cls)} - {"readings", "host"}
    missing = [name for name in names if f"`{name}`" not in text and f"`{name.removesuffix('_bytes')}`" not in text]
    assert missing == []


def test_the_documentation_names_every_phase_and_shape() -> None:
    text = DOCUMENTATION.read_text(encoding="utf-8")
    assert f"Phases: {', '.join(module.PHASES)}." in text
    assert all(shape in text for shape in SHAPES)
