"""What a GPU's memory does beside others and at its cap, and that graph modes agree. KV size, free memory while serving and
starts are `brim bench suite`'s now (they were the parts kv and starts of the record of 2026-11-23).

    python benchmarks/cuda_memory.py --models DIR [--parts cap,neighbour,two,modes] --json FILE

DIR holds the shapes (llama-3.1-8b, qwen3-0.6b) as folders with a config.json; weights are random. Each engine is a process of its
own; another thread samples the device through its management library every 20 ms.
"""

from __future__ import annotations

import argparse
import json
import platform as host
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pynvml

MIB, GIB = 1 << 20, 1 << 30
ENGINE = Path(__file__).with_name("device_engine.py")
BASE = {"load_format": "dummy", "max_model_len": 8192, "max_num_seqs": 256, "enable_prefix_caching": False}
NEIGHBOUR = """
import sys, torch
held = []
for line in sys.stdin:
    word, mib = line.split()
    try:
        if word == "take":
            held.append(torch.empty(int(mib) << 20, dtype=torch.uint8, device="cuda"))
        else:
            held.clear(); torch.cuda.empty_cache()
        print("ok", flush=True)
    except torch.OutOfMemoryError:
        print("refused", flush=True)
"""


class Watch:
    """Samples of the device: free bytes, and bytes by process."""

    def __init__(self) -> None:
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        self.samples: list[tuple[float, int, dict[int, int]]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def sample(self) -> tuple[float, int, dict[int, int]]:
        """Now."""
        listed = pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        free_bytes = pynvml.nvmlDeviceGetMemoryInfo(self._handle).free
        return time.time(), free_bytes, {p.pid: p.usedGpuMemory or 0 for p in listed}

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            self.samples.append(self.sample())

    def close(self) -> None:
        """No more samples."""
        self._stop.set()
        self._thread.join()

    def most_of(self, pid: int) -> int:
        """The most a process held at any sample."""
        return max((held.get(pid, 0) for _, _, held in self.samples), default=0)


class Engine:
    """A child that runs device_engine.py, and its events."""

    def __init__(self, model: Path, workloads: str = "", hold: bool = False, **settings: Any) -> None:
        command = [sys.executable, str(ENGINE), str(model), json.dumps({**BASE, **settings}), workloads]
        self.started = time.time()
        self.process = subprocess.Popen(
            [*command, "--hold"] if hold else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.events: list[dict[str, Any]] = []
        self.noise: list[str] = []

    def until(self, event: str, on_event: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Read events up to this one. Raises RuntimeError with what it printed where the process ends before."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                found = json.loads(line)
            except ValueError:
                self.noise.append(line.rstrip())
                continue
            if not isinstance(found, dict):
                continue
            self.events.append(found)
            if on_event is not None:
                on_event(found)
            if found["event"] == event:
                return found
        raise RuntimeError(f"no '{event}': {self.events[-1:]} {self.noise[-12:]}")

    def tell(self) -> None:
        """Let a held engine work."""
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)

    def result(self, name: str) -> Any:
        """Of a workload that is done."""
        return next(e["result"] for e in self.events if e["event"] == "done" and e["name"] == name)

    def end(self) -> None:
        """Kill what still runs."""
        self.process.kill()
        self.process.wait()


def summary(engine: Engine, ready: dict[str, Any]) -> dict[str, Any]:
    """What a start said of itself."""
    info, report = ready["info"], ready["report"]
    phases = {e["phase"]: round(e["time"] - engine.started, 3) for e in engine.events if e["event"] == "phase"}
    return {
        "kv_tokens": info["kv_tokens"],
        "cap_bytes": info["cap_bytes"],
        "graph_mode": info["graph_mode"],
        "ready_s": round(ready["time"] - engine.started, 3),
        "phase_begins_s": phases,
        "compile": [e["text"] for e in engine.events if e["event"] == "text" and e["text"]],
        "report": report,
        "device": info["device"],
    }


def cap(models: Path) -> dict[str, Any]:
    """A cap of 90 %: the most the process ever held beyond it."""
    found = {}
    for name in ("llama-3.1-8b", "qwen3-0.6b"):
        watch, engine = Watch(), Engine(models / name, "w,long", memory="90%")
        try:
            ready = engine.until("ready")
            engine.until("closed")
            most = watch.most_of(engine.process.pid)
            cap_bytes = ready["info"]["cap_bytes"]
            found[name] = {**summary(engine, ready), "process_most_bytes": most, "over_the_cap_bytes": most - cap_bytes}
        finally:
            engine.end()
            watch.close()
    return found


class Neighbour:
    """Another process that takes and gives back device memory on command."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", NEIGHBOUR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.held_mib = 0

    def say(self, word: str, mib: int = 0) -> bool:
        """Whether it got what it asked for."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(word, mib, file=self._process.stdin, flush=True)
        done = self._process.stdout.readline().strip() == "ok"
        self.held_mib = 0 if word == "give" else self.held_mib + mib * done
        return done

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def neighbour(models: Path) -> dict[str, Any]:
    """Takes 10 GiB while Brim starts, gives it back before it commits, takes as much again in pieces while Brim serves."""
    undisturbed = Engine(models / "qwen3-0.6b", "greedy")
    undisturbed.until("closed")
    expected = undisturbed.result("greedy")["checksum"]
    undisturbed.end()
    other, log = Neighbour(), []
    other.say("take", 16)  # its context exists before anything is measured
    engine = Engine(models / "qwen3-0.6b", "greedy,w,greedy", hold=True)

    def meddle(event: dict[str, Any]) -> None:
        if event.get("phase") == "load":
            log.append(("load: take 10 GiB", other.say("take", 10 << 10)))
        elif event.get("phase") == "capture":
            log.append(("capture: give back", other.say("give")))

    try:
        ready = engine.until("ready", meddle)
        engine.tell()
        engine.until("work")
        asked, granted, deadline = 0, 0, time.time() + 40
        while granted < 10 << 10 and time.time() < deadline and engine.process.poll() is None:
            asked += 1
            granted += 128 * other.say("take", 128)
            if any(e["event"] == "closed" for e in engine.events):
                break
            time.sleep(0.05)
        log.append((f"serving: took {granted} MiB in pieces of 128, {asked} tries", granted > 0))
        engine.until("closed")
        done = [e for e in engine.events if e["event"] == "done"]
        return {
            **summary(engine, ready),
            "log": log,
            "granted_mib": granted,
            "errors": [e for e in engine.events if e["event"] == "errors"],
            "same_tokens": [e["result"]["checksum"] == expected for e in done if e["name"] == "greedy"],
            "stats": done[-1]["stats"],
        }
    finally:
        engine.end()
        other.close()


def two(models: Path) -> dict[str, Any]:
    """Two processes of 30 GiB each on one device, serving at the same time."""
    watch = Watch()
    engines = [Engine(models / name, "w", hold=True, memory="30GiB") for name in ("llama-3.1-8b", "qwen3-0.6b")]
    try:
        readies = [engine.until("ready") for engine in engines]
        for engine in engines:
            engine.tell()
        for engine in engines:
            engine.until("closed")
        return {
            name: {
                **summary(engine, ready),
                "process_most_bytes": watch.most_of(engine.process.pid),
                "over_the_cap_bytes": watch.most_of(engine.process.pid) - ready["info"]["cap_bytes"],
                "work": engine.result("w"),
            }
            for name, engine, ready in zip(("first", "second"), engines, readies, strict=True)
        }
    finally:
        for engine in engines:
            engine.end()
        watch.close()


def modes(models: Path) -> dict[str, Any]:
    """Greedy tokens in every graph mode against eager: equal, or how near the two best logits were where they first differ."""
    found: dict[str, Any] = {}
    reference: dict[str, Any] | None = None
    cases = [{"graph_mode": mode} for mode in ("NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")]
    for case in (*cases, {"graph_mode": "FULL_AND_PIECEWISE", "arena": "static"}):
        engine = Engine(models / "qwen3-0.6b", "mixed", memory="20GiB", **case)
        name = " ".join(case.values())
        try:
            ready = engine.until("ready")
            engine.until("closed")
            result = engine.result("mixed")
            reference = reference or result
            found[name] = {**summary(engine, ready), **compare(reference, result)}
        except RuntimeError as error:
            found[name] = {"failed": str(error)}
        finally:
            engine.end()
    return found


def compare(reference: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Requests whose tokens equal the reference's; for the others, the gap of the two best at the first difference."""
    equal, gaps = 0, []
    for ours, theirs, gap in zip(result["tokens"], reference["tokens"], reference["gaps"], strict=True):
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        equal += first is None
        if first is not None:
            gaps.append(gap[first])
    return {"requests": len(result["tokens"]), "equal": equal, "gaps_where_they_differ": gaps}


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "cap": cap, "neighbour": neighbour, "two": two, "modes": modes,
}  # fmt: skip


def main() -> None:
    """Run the parts; a part that fails is recorded and the others go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    record: dict[str, Any] = {
        "command": f"python benchmarks/cuda_memory.py --parts {args.parts}",
        "versions": {name: version(name) for name in ("brim", "torch", "triton")} | {"python": host.python_version()},
        "parts": {},
    }
    for name in args.parts.split(","):
        started = time.time()
        try:
            record["parts"][name] = PARTS[name](args.models)
        except Exception as error:
            record["parts"][name] = {"failed": repr(error)}
        record["parts"][name]["part_s"] = round(time.time() - started, 1)
        print(name, json.dumps(record["parts"][name])[:1500], flush=True)
        if args.json:
            args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
