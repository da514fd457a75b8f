"""Real servers: uvicorn, an engine process of letters, the openai package as the client."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import pytest
from tests.e2e.command import SERVER

from brim.server.instances import Instance, list_instances

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 10.0


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = TIMEOUT_S) -> None:
    """Poll, or fail saying what did not happen."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"{what}: not within {timeout_s} s"
        time.sleep(0.02)


@dataclass
class Server:
    """A server process; lines: its stderr so far."""

    process: subprocess.Popen[str]
    folder: Path
    lines: list[str] = field(default_factory=list)
    url: str = ""

    def read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    @property
    def said(self) -> str:
        return "\n".join(self.lines)

    def wait_ready(self, timeout_s: float = TIMEOUT_S) -> Server:
        wait_until(lambda: "brim: serving" in self.said or self.process.poll() is not None, "serving", timeout_s)
        found = re.search(r"serving \S+ at (http\S+)/v1$", self.said, re.MULTILINE)
        assert found, self.said
        self.url = found.group(1)
        return self

    def wait_instance(self) -> list[Instance]:
        """What it says of itself before it serves."""

        def mine() -> list[Instance]:
            return [one for one in list_instances(self.folder / "brim") if one.pid == self.process.pid]

        wait_until(mine, "its instance file")
        return mine()

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=TIMEOUT_S)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=TIMEOUT_S, trust_env=False)

    def metric(self, name: str) -> float:
        found = re.search(rf"^{name} (\S+)$", self.get("/metrics").text, re.MULTILINE)
        assert found, name
        return float(found.group(1))

    def engine_pid(self) -> int:
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True, check=True)
        (pid,) = found.stdout.split()
        return int(pid)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT_S)


@contextlib.contextmanager
def running(*arguments: str, folder: Path, command: Sequence[str] = SERVER) -> Iterator[Server]:
    """A server from its start to its end, whatever happens."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_RUNTIME_DIR": str(folder), "TMPDIR": str(folder)}
    process = subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    server = Server(process, folder)
    reader = threading.Thread(target=server.read)
    reader.start()
    try:
        yield server
    finally:
        process.kill()
        process.wait()
        reader.join(TIMEOUT_S)
        assert process.stderr is not None
        process.stderr.close()


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """A folder whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="brim-test-") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def server(short_folder: Path) -> Iterator[Server]:
    """One for the tests that leave it as it was; 20 ms a step."""
    with running("slow", "max_body_bytes=50000", folder=short_folder) as one:
        yield one.wait_ready()


@pytest.fixture
def start(short_folder: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers that end with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(running(*arguments, folder=short_folder))
