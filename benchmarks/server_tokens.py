"""What the HTTP server costs a streamed token, without a device: an engine that answers at once, and clients that only read.

    python benchmarks/server_tokens.py [--clients 256] [--tokens 200] [--step-ms 20] [--chat] [--profile] [--json FILE]

Server, engine and clients are processes of their own. The engine's core is the real one over an executor that samples at once
and then waits --step-ms, so that every client gets a token a step. What counts is the processor time of the server alone,
from ready to the end: of a run of 2 tokens a client, which is what a request costs, and what the tokens beyond these add.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import platform
import pstats
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from host_step import VOCAB, InstantExecutor, new_core

from brim.cli.bench_server import write_tokenizer
from brim.config.resolve import resolve
from brim.config.schema import BrimConfig
from brim.engine.core import EngineCore
from brim.engine.engine_process import run_engine_process
from brim.engine.step import StepPlan, StepResult
from brim.server.http_server import run_server

FEW = 2
ME = str(Path(__file__).resolve())


class PacedExecutor(InstantExecutor):
    """Waits before it answers; ids that make text of a few letters each."""

    def __init__(self, step_s: float) -> None:
        super().__init__(None)
        self._step_s = step_s
        self._ids = self._ids * 397 % VOCAB

    def execute(self, plan: StepPlan) -> StepResult:
        """See Executor."""
        time.sleep(self._step_s)
        return super().execute(plan)

    def memory_report(self) -> dict[str, Any]:
        """Next to nothing."""
        return {"ledger": [], "kv": {}}


def engine(step_ms: float) -> int:
    """The engine's process."""

    def build(config: BrimConfig, on_progress: Callable[..., None]) -> tuple[EngineCore, dict[str, Any]]:
        info = {"model": config.model.model, "max_model_len": 8192, "vocab_size": VOCAB, "max_num_seqs": 256}
        return new_core(PacedExecutor(step_ms / 1000)), info

    return run_engine_process(build)


def server(folder: str, step_ms: float, profiled: bool) -> None:
    """The server's process: prints its processor seconds when it serves and when it ends."""
    config = resolve({"model": folder, "load_format": "dummy", "served_model_name": ["m"], "port": 0})
    profile = cProfile.Profile()

    def ready(info: Any) -> None:
        print(json.dumps({"cpu_s": time.process_time()}), file=sys.stderr, flush=True)
        if profiled:
            profile.enable()

    run_server(config, on_ready=ready, command=(sys.executable, ME, "--as", "engine", "--step-ms", str(step_ms)))
    print(json.dumps({"cpu_s": time.process_time()}), file=sys.stderr, flush=True)
    if profiled:
        profile.disable()
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(45)


async def read_all(port: int, path: str, body: bytes) -> tuple[int, float]:
    """One client: frames of one stream, and when the last came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    num_frames, tail = 0, b""
    while b"data: [DONE]" not in tail:
        data = await reader.read(1 << 16)
        if not data:
            raise RuntimeError(f"a stream broke off: {tail!r}")
        num_frames += (tail[-5:] + data).count(b"data: ") - tail[-5:].count(b"data: ")
        tail = (tail + data)[-256:]
    writer.close()
    return num_frames, time.perf_counter()


async def clients(port: int, count: int, tokens: int, chat: bool) -> tuple[int, float]:
    """All clients at once: frames of all, seconds."""
    body: dict[str, Any] = {"model": "m", "max_tokens": tokens, "temperature": 0.6, "stream": True, "ignore_eos": True}
    body |= {"messages": [{"role": "user", "content": "   "}]} if chat else {"prompt": list(range(100, 400))}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    started = time.perf_counter()
    found = await asyncio.gather(*(read_all(port, path, json.dumps(body).encode()) for _ in range(count)))
    return sum(frames for frames, _ in found), max(ended for _, ended in found) - started


def measure(args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """Start the server, run the clients, end it."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), VOCAB)
        (Path(folder) / "config.json").write_text("{}")  # the text side reads none of it
        template = {"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(template))
        command = [sys.executable, ME, "--as", "server", "--folder", folder, "--step-ms", str(args.step_ms)]
        process = subprocess.Popen([*command, "--profile"] if args.profile else command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        cpu_s, port = [], 0
        for line in process.stderr:
            if line.startswith("{"):
                cpu_s.append(json.loads(line)["cpu_s"])
            if " serving " in line:
                port = int(line.rsplit(":", 1)[1].split("/")[0])
                break
        frames, seconds = asyncio.run(clients(port, args.clients, tokens, args.chat))
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        process.wait()
    cpu_s += [json.loads(line)["cpu_s"] for line in rest.splitlines() if line.startswith("{")]
    if args.profile:
        print(rest)
    return {"cpu_s": cpu_s[-1] - cpu_s[0], "frames": frames, "seconds": seconds}


def main() -> int:
    """Measure, or be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--profile", action="store_true", help="say which functions take the time (and slow everything down)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--as", dest="role", choices=["server", "engine"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "engine":
        return engine(args.step_ms)
    if args.role == "server":
        server(args.folder, args.step_ms, args.profile)
        return 0
    few, many = measure(args, FEW), measure(args, args.tokens)
    found = {
        "us_per_token": (many["cpu_s"] - few["cpu_s"]) / (args.clients * (args.tokens - FEW)) * 1e6,
        "ms_per_request": few["cpu_s"] / args.clients * 1e3, "tokens_per_s": args.clients * args.tokens / many["seconds"],
        "few": few, "many": many, "arguments": [args.clients, args.tokens, args.step_ms, args.chat],
    }  # fmt: skip
    print(f"{found['us_per_token']:.1f} us of the server's processor a token, {found['ms_per_request']:.2f} ms a request; "
          f"{found['tokens_per_s']:,.0f} tokens/s to {args.clients} clients, {many['frames']:,} frames")  # fmt: skip
    if args.json:
        versions = {name: version(name) for name in ("brim", "uvicorn", "msgspec", "pyzmq")} | {
            "python": platform.python_version()
        }
        args.json.write_text(json.dumps({"command": "python benchmarks/server_tokens.py", "versions": versions, **found}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
