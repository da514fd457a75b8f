"""The memory page and the document behind it: fields, keys, headers, states of the engine, what a reader costs."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.server.conftest import CONFIG, Api

from brim.engine.messages import StartupProgress
from brim.engine.start_watch import StartWatch
from brim.errors import EngineError
from brim.memory.ledger import CATEGORIES
from brim.server.engine_account import EngineAccount
from brim.server.explanations import explain
from brim.server.live import LiveServer
from brim.server.waiting_room import Door, WaitingRoom

ROOT = Path(__file__).parents[3]
FIELDS = {"taken_s", "server", "engine", "info", "memory", "requests", "tokens", "first_token"}


def live(api: Api) -> dict[str, Any]:
    answer = api.get("/memory/live")
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    found: dict[str, Any] = answer.json()
    assert set(found) == FIELDS
    return found


def test_the_page_is_one_document_whose_policy_allows_its_own_parts_and_this_server_only(api: Api) -> None:
    answer = api.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert rules["connect-src"] == "'self'"
    for part in ("style", "script"):
        (text,) = re.findall(rf"<{part}>(.*?)</{part}>", answer.text, re.DOTALL)
        assert len(text) > 1000
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[f"{part}-src"] == f"'sha256-{digest}'"
    assert not re.findall(r"\s(?:src|style|on\w+)=", answer.text.split("<script>")[0])
    assert set(re.findall(r"https?://[^'\"\s]+", answer.text)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in answer.text


def test_the_document_has_what_the_engine_says_and_what_was_served(api: Api) -> None:
    api.complete("hello hello", max_tokens=5)
    found = live(api)
    assert found["server"]["names"] == ["letters", "alias"]
    assert found["server"]["takes_chat"] is True
    assert found["engine"] == {"state": "serving", "reason": "", "restarts": 0, "phases": []}
    assert found["requests"]["running"] == found["requests"]["waiting"] == 0
    assert found["tokens"] == {"prompt": 12, "generated": 5}
    assert found["first_token"]["count"] == 1
    assert found["first_token"]["sum_s"] > 0
    bounds = [bucket["within_s"] for bucket in found["first_token"]["buckets"]]
    counts = [bucket["count"] for bucket in found["first_token"]["buckets"]]
    assert bounds[:-1] == sorted(bounds[:-1])
    assert bounds[-1] is None
    assert (counts, counts[-1]) == (sorted(counts), 1)
    memory = api.get("/memory").json()
    assert [line | {"explanation": ""} for line in found["memory"]["ledger"]] == [
        line | {"explanation": ""} for line in memory["ledger"]
    ]
    assert {key: found["memory"][key] for key in memory if key not in ("ledger", "phases")} == {
        key: memory[key] for key in memory if key not in ("ledger", "phases")
    }


def test_an_engine_that_is_down_leaves_reason_and_phases_and_no_figures_of_its_own(api: Api) -> None:
    watch = StartWatch()
    watch.note(StartupProgress("open", "reading the device"))
    watch.note(StartupProgress("load", "layer 3", 0.25))
    api.engine.is_healthy, api.engine.reason, api.engine.num_restarts = False, "It is being restarted.", 2
    api.engine.start_phases = watch.phases
    found = live(api)
    assert (found["memory"], found["requests"]) == (None, None)
    engine = found["engine"]
    assert (engine["state"], engine["reason"], engine["restarts"]) == ("down", "It is being restarted.", 2)
    assert [(one["name"], one["is_done"], one["fraction"]) for one in engine["phases"]] == [
        ("open", True, None),
        ("load", False, 0.25),
    ]
    assert api.get("/memory/certificate").status_code == 503
    api.engine.is_healthy = True
    assert live(api)["memory"] is not None


def test_a_server_that_wants_a_key_shows_the_page_and_no_figure_without_it(make_api: Callable[..., Api]) -> None:
    api = make_api(replace(CONFIG, server=replace(CONFIG.server, api_keys=("one",))))
    assert api.get("/").status_code == 200
    for path in ("/memory/live", "/memory/certificate", "/memory", "/index.html"):
        assert api.get(path).status_code == 401, path
    assert api.get("/memory/live", headers={"authorization": "Bearer one"}).status_code == 200


def certified(api: Api, tmp_path: Path, text: str) -> None:
    path = tmp_path / "cpu-letters.json"
    path.write_text(text, encoding="utf-8")
    api.engine.info = {**api.engine.info, "certificate": str(path)}


def test_the_certificate_is_a_file_to_keep(api: Api, tmp_path: Path) -> None:
    text = json.dumps({"holds": True, "phases": api.get("/memory").json()["phases"]})
    certified(api, tmp_path, text)
    answer = api.get("/memory/certificate")
    assert answer.headers["content-disposition"] == 'attachment; filename="brim-cpu-letters.json"'
    assert answer.text == text
    assert live(api)["info"]["has_certificate"] is True


def test_a_certificate_that_is_not_of_this_start_is_not_given(api: Api, tmp_path: Path) -> None:
    assert "could write none" in api.get("/memory/certificate").json()["error"]["message"]
    certified(api, tmp_path, json.dumps({"phases": [{"name": "open", "seconds": 9.0}]}))
    answer = api.get("/memory/certificate")
    assert answer.status_code == 404
    assert "A later start" in answer.json()["error"]["message"]


def test_many_readers_cost_what_one_does(api: Api) -> None:
    asked: list[str] = []

    class Counting:
        is_healthy = True

        async def stats(self) -> dict[str, Any]:
            asked.append("stats")
            await asyncio.sleep(0.01)
            return {"running": 0}

        async def memory(self) -> dict[str, Any]:
            asked.append("memory")
            return {"cap_bytes": 1}

    async def read() -> None:
        account = EngineAccount(Counting())  # type: ignore[arg-type]
        await asyncio.gather(*(account.refresh(60.0) for _ in range(20)))
        assert asked == ["stats", "memory"]
        await account.refresh()  # a scrape is always fresh
        assert asked == ["stats", "memory"] * 2

    asyncio.run(read())


def test_an_engine_that_does_not_answer_is_asked_once_by_all_who_wait() -> None:
    asked: list[str] = []

    class Hung:
        is_healthy = True

        async def stats(self) -> dict[str, Any]:
            asked.append("stats")
            await asyncio.sleep(0.01)
            raise EngineError("The engine did not answer.")

    async def read() -> None:
        account = EngineAccount(Hung())  # type: ignore[arg-type]
        await asyncio.gather(*(account.refresh(60.0) for _ in range(5)))
        assert (asked, account.reason, account.stats) == (["stats"], "The engine did not answer.", {})

    asyncio.run(read())


def test_every_owner_the_code_writes_has_a_sentence() -> None:
    pair = re.compile(rf'(?<!phase\()"({"|".join(CATEGORIES)})",\s*"([^"]+)"')
    sources = [ROOT / "src" / "brim" / "worker" / name for name in ("startup.py", "phases.py")]
    found = {match for path in sources for match in pair.findall(path.read_text(encoding="utf-8"))}
    found |= {("context", "interpreter and libraries"), ("context", "device context")}
    found -= {("activations", owner) for owner in ("what starting leaves", "kernel images, allocator rounding")}  # of plans only
    assert len(found) > 15
    general = {explain(category, "") for category in CATEGORIES}
    assert not [pair for pair in found if explain(*pair) in general]
    assert all(explain(category, "somebody new").endswith(".") for category in CATEGORIES)


def test_the_waiting_room_shows_the_start_and_refuses_the_rest() -> None:
    watch = StartWatch()
    watch.note(StartupProgress("load", "reading weights", 0.5))
    door = Door(WaitingRoom(LiveServer.of_config(CONFIG), lambda: watch.phases))
    api = Api()
    own, api.app = api.app, door  # type: ignore[assignment]
    found = live(api)
    assert found["engine"]["state"] == "starting"
    assert found["engine"]["phases"][0] | {"seconds": 0} == {
        "name": "load", "text": "reading weights", "fraction": 0.5, "seconds": 0, "is_done": False,
    }  # fmt: skip
    assert found["memory"] is None
    assert "<title>" in api.get("/").text
    for path in ("/health", "/memory", "/memory/certificate", "/metrics", "/nowhere"):
        assert api.get(path).status_code == 503
    assert api.post("/", {}).status_code == 503
    door.app = own
    assert live(api)["engine"]["state"] == "serving"


def test_a_start_knows_its_phases_whatever_comes_late() -> None:
    watch = StartWatch()
    for phase, text in (("open", ""), ("capture", "1"), ("capture", "2"), ("commit", ""), ("capture", "again"), ("prove", "")):
        watch.note(StartupProgress(phase, text))
    assert [(one.name, one.text, one.is_done) for one in watch.phases] == [
        ("open", "", True), ("capture", "2", True), ("commit", "", True), ("prove", "", False),
    ]  # fmt: skip
    watch.note_ready()
    seconds = [one.seconds for one in watch.phases]
    assert [one.seconds for one in watch.phases] == seconds


@pytest.mark.parametrize("name", ["index.html", "page.css", "page.js"])
def test_the_parts_are_packaged(name: str) -> None:
    assert '"server/page/*"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert (ROOT / "src" / "brim" / "server" / "page" / name).is_file()
