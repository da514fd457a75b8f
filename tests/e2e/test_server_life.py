"""A server's start, its engine's deaths, and its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.e2e.conftest import Server, wait_until

from brim.server.instances import list_instances

Start = Callable[..., Server]
GREEDY = {"model": "letters", "temperature": 0.0, "extra_body": {"ignore_eos": True}}


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_engine_killed_mid_stream_is_said_and_brought_back(start: Start) -> None:
    server = start("slow").wait_ready()
    killed = server.engine_pid()
    with server.client() as client:
        whole = client.completions.create(prompt="hello", max_tokens=5, **GREEDY).choices[0].text
        stream = client.completions.create(prompt="hello", max_tokens=100, stream=True, **GREEDY)
        next(stream)
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="died while it served this request: it was killed by signal 9"):
            list(stream)
        assert server.get("/health").status_code == 503
        with pytest.raises(openai.InternalServerError, match="being restarted") as caught:
            client.completions.create(prompt="hello", **GREEDY)
        assert caught.value.status_code == 503
        wait_until(lambda: server.get("/health").status_code == 200, "the engine is back")
        assert client.completions.create(prompt="hello", max_tokens=5, **GREEDY).choices[0].text == whole
    assert server.metric("brim_engine_restarts_total") == 1
    assert server.engine_pid() != killed
    assert "killed by signal 9" in server.said


def test_an_engine_that_does_not_come_back_at_once_is_tried_again(start: Start, tmp_path: Path) -> None:
    once = tmp_path / "fail-once"
    server = start("letters", f"revision={once}").wait_ready()
    once.touch()
    os.kill(server.engine_pid(), signal.SIGKILL)
    wait_until(lambda: server.get("/health").status_code == 503, "the death is noticed")
    wait_until(lambda: server.get("/health").status_code == 200, "the second try")
    assert server.metric("brim_engine_restarts_total") == 2
    assert "not this time" in server.said


def test_a_server_that_starts_says_so_and_serves_once_it_announces_it(start: Start, tmp_path: Path) -> None:
    gate = tmp_path / "wait-for-this-to-go"
    gate.touch()
    server = start("waiting", f"revision={gate}", "port=0")
    (instance,) = server.wait_instance()
    for path in ("/health", "/v1/models", "/nowhere"):
        answer = httpx.get(instance.url + path, timeout=10, trust_env=False)
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert answer.json()["error"]["message"] == "The engine is starting; try again shortly."
    huge = httpx.post(f"{instance.url}/v1/completions", content=b"x" * 300_000, timeout=10, trust_env=False)
    assert huge.status_code == 503
    host, port = instance.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as silent:  # holds nobody up
        gate.unlink()
        server.wait_ready()
        assert server.get("/health").status_code == 200
        silent.close()


def test_sigterm_lets_requests_finish_and_refuses_new_ones(start: Start) -> None:
    server = start("slow").wait_ready()
    engine_pid = server.engine_pid()
    answers: list[str] = []

    def ask() -> None:
        with server.client() as client:
            done = client.completions.create(prompt="hello", max_tokens=60, **GREEDY)
            answers.append(str(done.choices[0].finish_reason))

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: server.metric("brim_requests_running") == 1, "it runs")
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: server.get("/health").status_code == 503, "draining")
    with server.client() as client, pytest.raises(openai.InternalServerError, match="shutting down"):
        client.completions.create(prompt="hello", **GREEDY)
    asking.join(10)
    assert answers == ["length"]
    assert server.process.wait(10) == 0
    assert not is_alive(engine_pid)


@pytest.mark.parametrize("settings", [("drain_seconds=0",), ()])
def test_a_drain_has_an_end(start: Start, settings: tuple[str, ...]) -> None:
    """By its time, or by a second signal."""
    server = start("slow", *settings).wait_ready()
    engine_pid = server.engine_pid()
    with server.client() as client:
        stream = client.completions.create(prompt="hello", max_tokens=100, stream=True, **GREEDY)
        next(stream)
        server.process.send_signal(signal.SIGINT)
        if not settings:
            wait_until(lambda: "may take 30 s" in server.said, "draining")
            server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
    assert server.process.wait(10) == 0
    assert not is_alive(engine_pid)


def test_a_server_that_is_killed_leaves_no_engine_and_no_instance(start: Start, short_folder: Path) -> None:
    server = start("letters").wait_ready()
    engine_pid = server.engine_pid()
    (instance,) = [one for one in list_instances(short_folder / "brim") if one.url == server.url]
    assert (instance.pid, instance.state, instance.name) == (server.process.pid, "serving", "letters")
    server.stop(signal.SIGKILL)
    wait_until(lambda: not is_alive(engine_pid), "the engine ends with its parent")
    assert server.url not in {one.url for one in list_instances(short_folder / "brim")}


def test_a_port_in_use_is_said_before_anything_starts(start: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = start("silent", f"port={port}")
        assert server.process.wait(10) == 1
    wait_until(lambda: "ConfigError" in server.said, "the error")
    assert f"127.0.0.1:{port}: another program has it; give another with --port" in server.said


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("huge", "MemoryBudgetError: It does not fit. Settings that would fit: --max-model-len 8."),
        ("silent", "EngineError: The engine process could not start: it ended with status 7. Its own output says more."),
    ],
)
def test_a_start_that_fails_raises_what_the_engine_said(start: Start, model: str, words: str) -> None:
    server = start(model)
    assert server.process.wait(10) == 1
    wait_until(lambda: words in server.said, "the error")


def test_keys_stay_with_the_server(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start("letters", "api_key=sesame").wait_ready()
    with server.client("sesame") as client:
        assert client.completions.create(prompt="hello", **GREEDY).choices[0].text
    with server.client("wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    found = Path(f"/proc/{server.engine_pid()}/cmdline")
    assert not found.exists() or b"sesame" not in found.read_bytes()


def test_brim_ps_shows_the_server_even_behind_a_key(
    start: Start, short_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from brim.cli.ps import ps

    server = start("letters", "api_key=sesame").wait_ready()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_folder))
    ps(as_json=True)
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["servers"]
    (row,) = [one for one in rows if one["url"] == server.url]
    assert (row["state"], row["cap_bytes"], row["held_bytes"]) == ("serving", 8192, 4096)
    assert (row["kv_tokens_used"], row["kv_tokens_total"], row["max_model_len"]) == (0, 796, 128)
