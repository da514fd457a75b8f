"""A server and its clients, all in processes of their own. Owns starting and ending them, and what their figures add up to."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from brim.cli.measure import moves_of
from brim.cli.workloads import Workload
from brim.errors import EngineError

_SERVING = re.compile(r"brim: serving (?P<model>.*) at (?P<url>http://\S+)")
_START_S = 300.0
_RUN_S = 300.0
_SAMPLE_S = 0.5
_MOST_CLIENT_PROCESSES = 8  # a token costs one 0.12 ms of a processor


@dataclass(frozen=True, slots=True)
class Served:
    """A server that serves. url ends in /v1; ready_s: from exec."""

    url: str
    model: str
    ready_s: float

    def memory(self) -> dict[str, Any]:
        """Its GET /memory."""
        with urllib.request.urlopen(f"{self.url.removesuffix('/v1')}/memory", timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


@contextlib.contextmanager
def serving(model: str, settings: Mapping[str, str], environment: Mapping[str, str]) -> Iterator[Served]:
    """`brim serve MODEL` on a free port of this machine's own address. Raises EngineError where it does not come to serve."""
    asked = {f"BRIM_{key.upper()}": str(value) for key, value in settings.items()}
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "brim", "serve", model],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment, **asked, "BRIM_HOST": "127.0.0.1", "BRIM_PORT": "0"},
    )
    assert process.stderr is not None, "its stderr is a pipe"
    late = threading.Timer(_START_S, process.kill)
    late.start()
    try:
        found, said = _until_serving(process.stderr)
        late.cancel()
        if found is None:
            raise EngineError(f"The measured server did not start: {said}")
        drain = threading.Thread(target=_pass_on, args=(process.stderr,), daemon=True)
        drain.start()
        yield Served(found["url"], found["model"], time.monotonic() - started)
    finally:
        late.cancel()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until_serving(stderr: IO[str]) -> tuple[dict[str, str] | None, str]:
    last = "it said nothing"
    for line in stderr:
        found = _SERVING.match(line)
        if found is not None:
            return found.groupdict(), ""
        last = line.strip() or last
    return None, last


def _pass_on(stderr: IO[str]) -> None:
    for line in stderr:
        print(line, end="", file=sys.stderr, flush=True)


def stream_workload(served: Served, workload: Workload) -> dict[str, Any]:
    """All requests of the workload at once, each a streaming client; output tokens a second of all, first tokens, memory.

    Raises EngineError where a client fails, or got other than it asked for.
    """
    requests = [
        {"prompt": list(prompt), "max_tokens": count, "temperature": workload.temperature, "seed": index}
        for index, (prompt, count) in enumerate(zip(workload.prompts, workload.num_new_tokens, strict=True))
    ]
    num_processes = max(1, min(_MOST_CLIENT_PROCESSES, len(os.sched_getaffinity(0)) // 2, len(requests)))
    shares = [requests[index::num_processes] for index in range(num_processes)]
    with _clients(served, shares) as clients, _Watch(served) as watch:
        ended = [_result_of(client) for client in clients]
    results = [result for one in ended for result in one["results"]]
    if sum(r["num_tokens"] for r in results) != workload.num_output_tokens:
        raise EngineError("The clients got other than the tokens they asked for; the measurement does not count.")
    started = min(one["started_at"] for one in ended)
    seconds = max(r["last_at"] for r in results) - started
    firsts = sorted((r["first_at"] - started) * 1000 for r in results)
    return {
        "tokens_per_s": workload.num_output_tokens / seconds, "seconds": seconds, "num_clients": len(requests),
        "num_client_processes": num_processes, "client": ended[0]["client"], "ready_s": served.ready_s,
        "frames": sum(r["num_frames"] for r in results),
        "first_token_ms": {"median": statistics.median(firsts), "last": firsts[-1]}, "memory": watch.summary(),
    }  # fmt: skip


@contextlib.contextmanager
def _clients(served: Served, shares: Sequence[Sequence[dict[str, Any]]]) -> Iterator[list[subprocess.Popen[str]]]:
    """Client processes that are all imported and connected to nothing yet, then told to go at once."""
    command = [sys.executable, "-m", "brim.cli.bench_client"]
    clients = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in shares]
    late = threading.Timer(_RUN_S, _kill_all, (clients,))
    late.start()
    try:
        for client, share in zip(clients, shares, strict=True):
            _tell(client, json.dumps({"url": served.url, "model": served.model, "requests": share}))
        for client in clients:
            assert client.stdout is not None, "its stdout is a pipe"
            if client.stdout.readline().strip() != "ready":
                raise EngineError("A client process did not start; `pip install openai` gives the client that is used.")
        for client in clients:
            _tell(client, "go")
        yield clients
    finally:
        late.cancel()
        for client in clients:
            client.kill()
            client.wait()
            for pipe in (client.stdin, client.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()


def _kill_all(clients: Sequence[subprocess.Popen[str]]) -> None:
    for client in clients:
        client.kill()


def _tell(client: subprocess.Popen[str], line: str) -> None:
    assert client.stdin is not None, "its stdin is a pipe"
    with contextlib.suppress(BrokenPipeError):  # it ended: the missing answer says so
        client.stdin.write(line + "\n")
        client.stdin.flush()


def _result_of(client: subprocess.Popen[str]) -> dict[str, Any]:
    assert client.stdout is not None, "its stdout is a pipe"
    line = client.stdout.readline()
    if not line:
        raise EngineError(f"A client process ended with {client.wait()}; its own output says more.")
    found: dict[str, Any] = json.loads(line)
    return found


class _Watch:
    """Samples of the server's memory while clients work."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._samples: list[tuple[int, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                report = self._served.memory()
                self._samples.append((int(report["free_bytes"]), int(report["resident_bytes"])))
            if self._stop.wait(_SAMPLE_S):
                return

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def summary(self) -> dict[str, Any]:
        return moves_of(self._samples)


def write_tokenizer(folder: Path, vocab_size: int) -> Path:
    """A tokenizer whose every id is a space and a short word, for shapes that have none: without text there is nothing to
    stream. All it can encode is spaces."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = {"Ġ": 0}
    for index in range(1, vocab_size):
        word, rest = "", index
        while rest:
            rest, letter = divmod(rest, len(letters))
            word += letters[letter]
        vocab[f"Ġ{word}"] = index
    spelling = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content = {
        "version": "1.0", "added_tokens": [], "pre_tokenizer": spelling, "decoder": spelling,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
