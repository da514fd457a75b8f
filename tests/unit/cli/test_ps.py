"""`brim ps`: the servers of this machine."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.unit.cli.conftest import Brim

from brim.cli.ps import format_duration
from brim.machine import as_json
from brim.platforms.local_devices import DeviceProcess, LocalDevice
from brim.server.instances import InstanceFile, instances_folder
from brim.units import GIB, MIB

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


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What this machine has, in tests: nothing, until it is put in."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr("brim.machine.local_devices", lambda: found)
    return found


def test_nothing_runs(brim_command: Brim, folder: Path) -> None:
    assert brim_command("ps").err == "No Brim server is running on this machine.\n"
    assert json.loads(brim_command("ps", "--json").out) == {"servers": [], "devices": []}


def test_the_table_shows_what_a_server_holds(brim_command: Brim, instance: InstanceFile) -> None:
    head, _, row = brim_command("ps").out.splitlines()
    assert head.split() == ["NAME", "PID", "HELD", "OF", "CAP", "KV", "UP", "URL"]
    assert row.split("  ")[:2] == ["demo", str(instance.instance.pid)]
    assert re.split(r"  +", row)[2:5] == ["900.00 MiB", "1.00 GiB", "2 %"]
    assert row.endswith(instance.instance.url)


def gpu_of(instance: InstanceFile) -> LocalDevice:
    held = (
        DeviceProcess(4_194_303, 60 * GIB, "python3", instance.instance.pid),
        DeviceProcess(7, 12 * GIB, "a program whose name is longer than any table", 1),
        DeviceProcess(8, 5 * MIB),
    )
    return LocalDevice("cuda", 0, "NVIDIA H100 80GB HBM3 of a very long name", 80 * GIB, 7 * GIB, held)


def test_devices_show_their_neighbours_and_which_of_them_is_brim(
    brim_command: Brim, instance: InstanceFile, devices: list[dict[str, Any]]
) -> None:
    devices.append(as_json(gpu_of(instance)))
    devices.append(as_json(LocalDevice("xpu", 0, "Arc", None, 3 * GIB, None)))
    out = brim_command("ps").out
    assert max(map(len, out.splitlines())) <= 80
    rows = [re.split(r"  +", row.strip()) for row in out.split("\n\n")[1].splitlines()]
    assert rows[0] == ["DEVICE", "PID", "WHO", "HELD", "SHARE"]
    assert rows[2] == ["cuda 0", "NVIDIA H100 80GB HBM3~ (80.00 GiB)", "73.00 GiB", "91 %"]
    assert rows[3] == ["4194303", "brim: demo", "60.00 GiB", "75 %"]
    assert rows[4] == ["7", "a program whose name is longer th~", "12.00 GiB", "15 %"]
    assert rows[5] == ["8", "not to be seen from here", "5.00 MiB", "< 1 %"]
    assert rows[6] == ["the driver, and who is not listed", "1,019.00 MiB", "1 %"]
    assert rows[7:] == [["xpu 0", "Arc (3.00 GiB free)", "-", "-"], ["processes are not listed here"]]
    (found, other) = json.loads(brim_command("ps", "--json").out)["devices"]
    assert [one["server"] for one in found["processes"]] == ["demo", None, None]
    assert (found["used_bytes"], found["unnamed_bytes"]) == (73 * GIB, GIB - 5 * MIB)
    assert (other["used_bytes"], other["processes"]) == (None, None)


def test_the_widest_row_fits(brim_command: Brim, folder: Path, server: Answering) -> None:
    file = InstanceFile.open("meta-llama/Llama-3.1-8B-Instruct", f"http://127.0.0.1:{server.server_port}")
    assert file is not None
    server.key = file.instance.key
    server.answer = json.dumps({**MEMORY, "cap_bytes": 1000 * MIB, "held_bytes": 999 * MIB}).encode()
    file.set_state("serving")
    out = brim_command("ps").out
    file.close()
    assert "meta-llama/~" in out
    assert max(map(len, out.splitlines())) <= 80


def test_json_has_the_figures(brim_command: Brim, instance: InstanceFile) -> None:
    (found,) = json.loads(brim_command("ps", "--json").out)["servers"]
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
    assert (row[0], row[2:5]) == ("demo", ["-", "-", "starting"])
    file.close()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.9, "59s"), (60, "1m 0s"), (3600, "1h 0m"), (93784, "1d 2h"), (8_640_000, "100d 0h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
