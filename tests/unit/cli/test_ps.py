"""`brim ps`: the servers of this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.unit.cli.conftest import Brim

from brim.cli.ps import format_duration
from brim.server.instances import InstanceFile, instances_folder

MEMORY = {
    "cap_bytes": 1 << 30,
    "held_bytes": 900 << 20,
    "ledger": [],
    "kv": {"kv_tokens": 4096, "max_model_len": 2048, "groups": [{"num_tokens": {"free": 3000, "used": 96, "cached": 1000}}]},
}


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where servers of this test say that they live."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return instances_folder()


class Answering(HTTPServer):
    """A server that answers /memory to whoever has the key."""

    key = ""
    answer = json.dumps(MEMORY).encode()

    class Handler(BaseHTTPRequestHandler):
        """One answer."""

        server: Answering

        def do_GET(self) -> None:
            good = self.path == "/memory" and self.headers["Authorization"] == f"Bearer {self.server.key}"
            self.send_response(200 if good else 401)
            self.end_headers()
            self.wfile.write(self.server.answer)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""


@pytest.fixture
def server() -> Iterator[Answering]:
    with Answering(("127.0.0.1", 0), Answering.Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def instance(folder: Path, server: Answering) -> Iterator[InstanceFile]:
    file = InstanceFile.open("demo", f"http://127.0.0.1:{server.server_port}")
    assert file is not None
    server.key = file.instance.key
    file.set_state("serving")
    yield file
    file.close()


def test_nothing_runs(brim_command: Brim, folder: Path) -> None:
    assert brim_command("ps").err == "No Brim server is running on this machine.\n"
    assert json.loads(brim_command("ps", "--json").out) == []


def test_the_table_shows_what_a_server_holds(brim_command: Brim, instance: InstanceFile) -> None:
    head, _, row = brim_command("ps").out.splitlines()
    assert head.split("  ")[0] == "NAME"
    assert row.startswith(f"demo  {instance.instance.pid}  {instance.instance.url}  1.00 GiB  900.00 MiB   96/4,096    2,048  ")


def test_json_has_the_figures(brim_command: Brim, instance: InstanceFile) -> None:
    (found,) = json.loads(brim_command("ps", "--json").out)
    assert found.pop("uptime_s") >= 0
    assert found == {
        "name": "demo",
        "pid": instance.instance.pid,
        "url": instance.instance.url,
        "state": "serving",
        "cap_bytes": 1 << 30,
        "held_bytes": 900 << 20,
        "kv_tokens_used": 96,
        "kv_tokens_cached": 1000,
        "kv_tokens_total": 4096,
        "max_model_len": 2048,
    }


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b"\xff", b"nonsense"])
def test_a_server_that_answers_nonsense_is_listed_all_the_same(
    brim_command: Brim, instance: InstanceFile, server: Answering, answer: bytes
) -> None:
    server.answer = answer
    assert "no answer" in brim_command("ps").out


def test_a_server_that_starts_is_listed_as_such(brim_command: Brim, folder: Path) -> None:
    file = InstanceFile.open("demo", "http://127.0.0.1:9")
    assert file is not None
    row = brim_command("ps").out.splitlines()[2].split()
    assert (row[0], row[3:7]) == ("demo", ["-", "-", "starting", "-"])
    file.close()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.9, "59s"), (60, "1m 0s"), (3600, "1h 0m"), (93784, "1d 2h"), (8_640_000, "100d 0h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
