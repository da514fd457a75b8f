"""`brim doctor`: the document, the tables, exit codes, and platforms that kill the process that tries them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from tests.small_models import write_small_model
from tests.unit.cli.conftest import Brim, Ended

from brim.cli import doctor as doctor_module
from brim.cli.doctor_report import print_report
from brim.config.avoid_record import write_record
from brim.config.schema import Avoided

KEYS = {"ok", "platforms", "machine", "readings", "start", "checks", "contradictions", "avoided", "problems", "seconds"}
CHECK_KEYS = {"name", "did", "outcome", "reason", "note", "figures", "seconds", "capability", "workaround"}
NUM_CHECKS = 18

# Third-party platforms over the scripted device, by the name of their entry point.
THIRD_PARTY = '''
"""Platforms that do what their names say."""

import contextlib, os, time
from brim.errors import DeviceError, OutOfDeviceMemory
from brim.platforms.fake import FakeDevice, FakePlatform


class Plain(FakePlatform):
    name = "plain"

    def __init__(self):
        super().__init__(FakeDevice())


class Deadly(Plain):
    """Its capture ends the process."""
    name = "deadly"

    def __init__(self):
        super().__init__()
        self.restrict(graphs=True, graph_modes=("NONE", "FULL_DECODE_ONLY"))

    @contextlib.contextmanager
    def capture(self):
        os._exit(9)
        yield


class Opens(Plain):
    name = "opens"

    def __init__(self):
        if os.environ.get("PLATFORM_DIES"):
            os._exit(11)
        raise DeviceError("The cable is not plugged in.")


class Refusing(Plain):
    """Its commits fail."""
    name = "refusing"

    def account(self, delta_bytes):
        if delta_bytes > 0:
            raise OutOfDeviceMemory("No handle of that size.")
        super().account(delta_bytes)
'''


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution with these platforms, seen by this process's children."""
    (tmp_path / "odd_platforms.py").write_text(THIRD_PARTY)
    info = tmp_path / "odd_platforms-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-platforms\nVersion: 1.0\n")
    names = {"plain": "Plain", "deadly": "Deadly", "opens": "Opens", "refusing": "Refusing"}
    points = "".join(f"{name} = odd_platforms:{kind}\n" for name, kind in names.items())
    (info / "entry_points.txt").write_text(f"[brim.platforms]\n{points}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def document(ended: Ended) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ended.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found.keys() == KEYS
    assert all(check.keys() == CHECK_KEYS for check in found["checks"])
    return found


def shown(found: dict[str, Any]) -> str:
    """What a person sees of this document, its lines joined."""
    out = io.StringIO()
    print_report(found, out)
    assert max(len(line) for line in out.getvalue().splitlines()) <= 80
    return " ".join(out.getvalue().split())


def by_name(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in found["checks"]}


def test_this_machine_is_well(brim_command: Brim) -> None:
    ended = brim_command("doctor", "--device", "cpu", "--json")
    found = document(ended)
    assert (ended.code, found["ok"], found["problems"], found["contradictions"]) == (0, True, [], [])
    assert {"name": "cpu", "opened": True}.items() <= found["platforms"][0].items()
    assert found["machine"]["platform"] == "cpu"
    assert found["machine"]["versions"].keys() >= {"python", "torch", "brim"}
    assert {cap["memory"] for cap in found["readings"]["caps"]} == {"max", "enough"}
    assert found["readings"]["free_bytes"] > 0
    assert len(found["checks"]) == NUM_CHECKS
    assert found["start"]["model"] is None
    assert "plan" not in found["start"]
    assert found["start"]["graph_mode"]["reason"]


def test_the_tables_fit_80_columns_and_are_plain(brim_command: Brim) -> None:
    ended = brim_command("doctor", "--device", "cpu")
    assert ended.code == 0
    assert max(len(line) for line in ended.out.splitlines()) <= 80
    assert "\x1b" not in ended.out
    assert all(line == line.rstrip() for line in ended.out.splitlines())
    for words in ("Platforms", "Readings", "Checks", "commit_later", "What start-up would do", "All is well: 15 ok"):
        assert words in ended.out
    assert ended.err == ""


def test_a_model_brings_its_plan(brim_command: Brim, tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model")
    ended = brim_command("doctor", str(model), "--device", "cpu", "--max-num-seqs", "3", "--enforce-eager", "--json")
    found = document(ended)
    start = found["start"]
    assert (ended.code, start["model"], start["dtype"]) == (0, str(model), "float32")
    assert start["limits"]["max_num_seqs"] == {"value": 3, "source": "flag"}
    assert start["limits"]["max_num_batched_tokens"]["source"] == "default"
    assert start["graph_mode"] == {"mode": "NONE", "reason": "--enforce-eager asks for no graphs."}
    assert start["plan"]["kv"]["tokens"] >= 512
    assert {line["category"] for line in start["plan"]["ledger"]} >= {"weights", "workspace", "kv_cache"}
    text = shown(found)
    assert "weights model" in text
    assert "KV cache: " in text


def test_shapes_alone_are_enough(brim_command: Brim, tmp_path: Path) -> None:
    config = write_small_model(tmp_path / "model") / "config.json"
    start = document(brim_command("doctor", str(config), "--load-format", "dummy", "--device", "fake", "--json"))["start"]
    assert start["refused"] is None
    assert start["plan"]["memory"] == "max"
    assert start["plan"]["total_bytes"] == 16 << 30


def test_a_refusal_is_printed_as_serve_would(brim_command: Brim, tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model")
    ended = brim_command("doctor", str(model), "--device", "fake", "--memory", "301MiB", "--json")
    found = document(ended)
    refused = found["start"]["refused"]
    assert (ended.code, refused["error"], bool(refused["nearest"])) == (1, "MemoryBudgetError", True)
    text = shown(found)
    assert f"A start would be refused: {' '.join(refused['message'].split())}" in text
    assert "one full-length request" in text, "with its ledger"
    assert "Not all is well" in text


def test_a_model_that_is_not_there_fails_the_start_alone(brim_command: Brim) -> None:
    ended = brim_command("doctor", "/no/such/model", "--device", "fake", "--json")
    found = document(ended)
    assert ended.code == 1
    assert found["start"]["refused"]["error"] == "ModelNotFound"
    assert len(found["checks"]) == NUM_CHECKS
    assert not any(check["outcome"] == "failed" for check in found["checks"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device", "abacus"), "--device abacus is not installed here; this installation has"),
        (("--memory", "much"), "--memory 'much' is not understood"),
        (("--no-such-flag",), "--no-such-flag"),
    ],
)
def test_wrong_usage_is_2(brim_command: Brim, arguments: tuple[str, ...], words: str) -> None:
    ended = brim_command("doctor", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert words in ended.err


def test_a_third_partys_platform_is_checked_by_its_name(brim_command: Brim, third_party: Path) -> None:
    found = document(brim_command("doctor", "--device", "plain", "--json"))
    assert found["ok"]
    assert found["machine"]["platform"] == "plain"
    rows = {row["name"]: row for row in found["platforms"]}
    assert rows["plain"]["opened"]
    assert rows["opens"] == {"name": "opens", "opened": False, "reason": "The cable is not plugged in."}


def test_a_capture_that_kills_is_one_failed_check(brim_command: Brim, third_party: Path) -> None:
    ended = brim_command("doctor", "--device", "deadly", "--json")
    found = document(ended)
    checks = by_name(found)
    assert ended.code == 1
    assert len(checks) == NUM_CHECKS
    failed = {name for name, check in checks.items() if check["outcome"] == "failed"}
    assert failed == {"graph", "graph_commit_later"}
    assert "ended with exit code 9" in checks["graph"]["reason"]
    assert checks["cap"]["outcome"] == "passed", "what comes after is tried in a new process"
    assert [(row["capability"], row["name"]) for row in found["contradictions"]] == [
        ("graphs", "graph"),
        ("graphs", "graph_commit_later"),
    ]
    assert "Declared but not working: graphs (graph). Start without it: --enforce-eager." in shown(found)
    eager = brim_command("doctor", "--device", "deadly", "--enforce-eager", "--json")
    assert eager.code == 0, "the workaround works"
    assert by_name(document(eager))["graph"]["reason"] == "--enforce-eager asks to do without."


def test_a_capture_that_hangs_is_one_failed_check(brim_command: Brim, third_party: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (third_party / "odd_platforms.py").read_text().replace("os._exit(9)", "time.sleep(600)")
    (third_party / "odd_platforms.py").write_text(source)
    in_a_hurry = (
        "from brim.worker import conformance as c; from dataclasses import replace; "
        "c.CHECKS = tuple(replace(x, timeout_s=1.0) if 'graph' in x.name else x for x in c.CHECKS); c.main()"
    )
    monkeypatch.setattr(doctor_module, "_CHECKS", (doctor_module._CHECKS[0], "-c", in_a_hurry))
    checks = by_name(document(brim_command("doctor", "--device", "deadly", "--json")))
    assert "hung: it said nothing for 1 s and was killed" in checks["graph"]["reason"]
    assert checks["cap"]["outcome"] == "passed"


def test_a_commit_that_fails_names_its_workaround(brim_command: Brim, third_party: Path) -> None:
    ended = brim_command("doctor", "--device", "refusing")
    assert ended.code == 1
    text = " ".join(ended.out.split())
    assert "Declared but not working: reserve_commit (arena). Start without it: --arena static." in text
    assert "No handle of that size." in text


def test_a_platform_that_does_not_open(brim_command: Brim, third_party: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = brim_command("doctor", "--device", "opens", "--json")
    found = document(ended)
    assert (ended.code, found["machine"], found["problems"]) == (1, None, ["The cable is not plugged in."])
    assert {check["outcome"] for check in found["checks"]} == {"not_tried"}
    monkeypatch.setenv("PLATFORM_DIES", "1")
    ended = brim_command("doctor", "--device", "opens", "--json")
    found = document(ended)
    assert (ended.code, len(found["problems"])) == (1, 1)
    assert "The process could not begin: the process ended with exit code 11" in found["problems"][0]
    rows = {row["name"]: row for row in found["platforms"]}
    assert "exit code 11" in rows["opens"]["reason"]
    assert rows["plain"]["opened"], "another platform's death is not this one's"
    assert "Problem: The process could not begin" in shown(found)


def test_what_starts_do_without_is_shown_and_forgotten(
    brim_command: Brim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRIM_CACHE_DIR", str(tmp_path))
    avoided = Avoided("graphs", "NONE", "the engine died while capturing graphs (SIGABRT)")
    path = write_record({"platform": "cpu", "device": "an abacus", "model": "a/long-model-name"}, (avoided,))
    found = document(brim_command("doctor", "--device", "cpu", "--json"))
    assert found["ok"]
    (record,) = found["avoided"]
    assert (record["path"], record["avoided"]) == (str(path), [{"feature": "graphs", "most": "NONE", "reason": avoided.reason}])
    words = shown(found)
    assert "What starts do without (brim doctor --forget: try it again)" in words
    assert "graphs: NONE" in words and "an abacus" in words and "SIGABRT" in words
    assert json.loads(brim_command("doctor", "--forget", "--json").out) == {"forgotten": [str(path)]}
    ended = brim_command("doctor", "--forget")
    assert (ended.code, ended.out) == (0, "There was nothing to forget.\n")
