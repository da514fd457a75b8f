"""`brim plan --scenario`: the verdict, its forms and exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.unit.cli.conftest import Brim

SCENARIOS = Path(__file__).parents[2] / "scenarios"
LOST = SCENARIOS / "vllm-39977-graph-estimate-loses-the-device.toml"
REFUSED = SCENARIOS / "vllm-49878-pinned-bytes.toml"


def test_one_scenario_is_a_start_up_report_with_a_verdict(brim_command: Brim) -> None:
    ended = brim_command("plan", "--scenario", str(LOST))
    assert ended.code == 0 and max(map(len, ended.out.splitlines())) <= 80
    assert "UR_RESULT_ERROR_DEVICE_LOST" in ended.out and "Without graphs" in ended.out
    assert re.search(r"KV cache: [\d,]+ tokens, 1\.0000 of the", ended.out) and "All that must hold does." in ended.out


def test_several_are_a_table(brim_command: Brim) -> None:
    ended = brim_command("plan", "--scenario", str(LOST), "--scenario", str(REFUSED))
    assert ended.code == 0 and "2 of 2 scenarios hold" in ended.out
    assert "refuses" in ended.out and max(map(len, ended.out.splitlines())) <= 80


def test_json_tells_what_did_not_hold(brim_command: Brim, tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(LOST.read_text().replace('without = ["graphs"]', 'without = ["compile"]'))
    ended = brim_command("plan", "--json", "--scenario", str(file))
    (found,) = json.loads(ended.out)
    assert ended.code == 1 and not found["ok"] and "expected ('compile',)" in found["wrong"][0]
    assert found["kv_tokens"] > 0 and found["graph_mode"] == "NONE" and found["ledger"]


@pytest.mark.parametrize(("arguments", "said"), [((), "MODEL|--scenario"), (("--scenario", "nowhere.toml"), "cannot be read")])
def test_wrong_usage(brim_command: Brim, arguments: tuple[str, ...], said: str) -> None:
    ended = brim_command("plan", *arguments)
    assert ended.code == 2 and re.search(said, ended.err)


def test_the_example_of_the_documentation_holds(brim_command: Brim, tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs/scenarios.md").read_text(encoding="utf-8")
    example = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert example is not None
    (tmp_path / "example.toml").write_text(example.group(1))
    ended = brim_command("plan", "--scenario", str(tmp_path / "example.toml"))
    assert ended.code == 0, ended.out + ended.err
