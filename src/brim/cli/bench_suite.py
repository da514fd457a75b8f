"""All figures of a device in one run. Owns which parts there are, their sizes, their order, and the record they add up to.

limits -> start with nothing cached -> second start, decode, prefill, workload -> long contexts -> server, for each model. Every
engine is a process of its own. A part that fails is recorded and said; the others go on.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from brim.cli.bench_figures import figures_of, linear_shapes
from brim.cli.bench_server import serving, stream_workload, write_tokenizer
from brim.cli.measure import EngineRun, measure_limits, run_engine
from brim.cli.options import build_config
from brim.cli.workloads import workload_named
from brim.config.model_source import open_model
from brim.config.model_spec import ModelSpec
from brim.errors import BrimError, ConfigError, UnsupportedModel

PARTS = ("start", "decode", "prefill", "workload", "long", "beside", "server")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything. max_model_len: of the engines for short contexts."""

    batch_sizes: tuple[int, ...]
    input_len: int
    output_len: int
    num_iters: int
    prefill_len: int
    workload: str
    num_seqs: int
    long_batch: int
    long_len: int
    long_output_len: int
    beside_batch: int
    beside_len: int
    max_model_len: int


ACCELERATOR = Sizes((1, 8, 64), 128, 256, 3, 8000, "W", 256, 16, 32768, 128, 8, 32000, 8192)
HOST = Sizes((1, 8), 128, 48, 3, 512, "mixed-16", 16, 2, 2048, 32, 2, 2048, 1024)
_CONTEXT_SPARE = 512  # tokens beside the long prompts


@dataclass(frozen=True, slots=True)
class Subject:
    """One model to measure. settings: the flags as typed, with what a shape without weights needs."""

    name: str
    model: str
    settings: dict[str, Any]
    spec: ModelSpec
    has_tokenizer: bool


def subjects_of(models: Sequence[str], folder: Path | None, settings: Mapping[str, Any], say: Say) -> list[Subject]:
    """The named models, and every shape (a folder with a config.json) in `folder`; shapes that no model here has are left out and
    said. Raises ConfigError, ModelError."""
    found = [_subject(Path(model).name or model, model, dict(settings)) for model in models]
    for path in sorted(folder.glob("*/config.json")) if folder is not None else ():
        try:
            found.append(_subject(path.parent.name, str(path.parent), dict(settings)))
        except UnsupportedModel as error:
            say(f"{path.parent.name} is left out: {error}")
    if not found:
        raise ConfigError("There is nothing to measure; give --model MODEL, or --models FOLDER of folders with a config.json.")
    return found


def _subject(name: str, model: str, settings: dict[str, Any]) -> Subject:
    bare = (Path(model) / "config.json").is_file() and not any(Path(model).glob("*.safetensors"))
    if bare:
        settings.setdefault("load_format", "dummy")
    source = open_model(build_config(model, settings).model)
    source.close()
    return Subject(name, model, settings, source.spec, source.files.tokenizer_path is not None or "tokenizer" in settings)


def run_suite(
    subjects: Sequence[Subject], parts: Sequence[str], say: Say, keep: Callable[[dict[str, Any]], None] = lambda record: None
) -> dict[str, Any]:
    """The record: what it was measured on, limits, and for each model its parts and figures. keep gets it after each model, as
    far as it is, so that a run which is cut off leaves something."""
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise ConfigError(f"There is no part '{min(unknown)}'; the parts are {', '.join(PARTS)}.")
    started = time.monotonic()
    config = build_config(subjects[0].model, subjects[0].settings)
    device, threads = config.device.device, config.device.num_threads or 0
    say("limits of the device")
    limits = measure_limits(
        device, threads, products=True, rows=list(ACCELERATOR.batch_sizes),
        linears={subject.name: linear_shapes(subject.spec) for subject in subjects},
    )  # fmt: skip
    host_memory = limits.pop("host_memory")
    sizes = HOST if host_memory else ACCELERATOR
    record: dict[str, Any] = {
        "command": shlex.join(["brim", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"brim": version("brim"), "torch": version("torch"), "python": sys.version.split()[0]},
        "device": limits.pop("device"),
        "limits": limits,
        "sizes": asdict(sizes),
        "models": {},
    }
    for subject in subjects:
        found = _Run(subject, sizes, parts, say).all()
        record["models"][subject.name] = {**found, "host_memory": host_memory}
        keep(record)
    if host_memory:  # neighbours take bandwidth: what was reached later could be reached before
        again = measure_limits(device, threads)
        limits["bandwidth_bytes_per_s"] = max(limits["bandwidth_bytes_per_s"], again["bandwidth_bytes_per_s"])
    for subject in subjects:
        found = record["models"][subject.name]
        found["figures"] = figures_of(subject.spec, found, limits, subject.name)
    record["total_s"] = round(time.monotonic() - started, 1)
    return record


class _Run:
    """One model's parts, with caches of its own, empty at first."""

    def __init__(self, subject: Subject, sizes: Sizes, parts: Sequence[str], say: Say) -> None:
        self._subject = subject
        self._sizes = sizes
        self._parts = set(parts)
        self._say = say
        self._found: dict[str, Any] = {"memory": {}}

    def all(self) -> dict[str, Any]:
        """part -> result, or {"failed": why}; info and kv of the engine for short contexts; memory by engine."""
        with tempfile.TemporaryDirectory(prefix="brim-bench-") as folder:
            self._environment = {"BRIM_CACHE_DIR": f"{folder}/brim", "TRITON_CACHE_DIR": f"{folder}/triton"}
            if "start" in self._parts:
                self._guard(("start_cold",), self._start_cold)
            self._guard(("start_second", *self._parts & {"decode", "prefill", "workload"}), self._short)
            if self._parts & {"long", "beside"}:
                self._guard(tuple(self._parts & {"long", "beside"}), self._long)
            if "server" in self._parts:
                self._guard(("server",), lambda: self._server(Path(folder)))
        return self._found

    def _guard(self, names: Sequence[str], work: Callable[[], None]) -> None:
        started = time.monotonic()
        try:
            work()
        except (BrimError, OSError) as error:
            self._say(f"{self._subject.name}: failed: {error}")
            for name in names:
                self._found.setdefault(name, {"failed": str(error)})
        self._say(f"{self._subject.name}: {', '.join(names)}: {time.monotonic() - started:.1f} s")

    def _engine(self, parts: Sequence[dict[str, Any]], max_model_len: int, **settings: Any) -> EngineRun:
        merged = {"max_model_len": max_model_len, "enable_prefix_caching": False, **settings, **self._subject.settings}
        return run_engine(self._subject.model, merged, parts, environment=self._environment)

    def _start_cold(self) -> None:
        run = self._engine((), self._sizes.max_model_len)
        self._found["start_cold"] = _start_of(run)

    def _short(self) -> None:
        sizes = self._sizes
        lengths = {"input_len": sizes.input_len, "output_len": sizes.output_len, "num_iters": sizes.num_iters}
        asked: dict[str, dict[str, Any]] = {
            "decode": {"batch_sizes": list(sizes.batch_sizes), **lengths},
            "prefill": {"input_len": sizes.prefill_len, "num_iters": sizes.num_iters},
            "workload": {"name": sizes.workload, "num_seqs": sizes.num_seqs},
        }
        run = self._engine([{"part": p, **asked[p]} for p in asked if p in self._parts], sizes.max_model_len)
        if "start" in self._parts:
            self._found["start_second"] = _start_of(run)
        self._found |= {"info": run.info, "kv": run.memory.pop("kv"), **run.parts}
        self._found["memory"]["short contexts"] = run.memory

    def _long(self) -> None:
        sizes = self._sizes
        asked: dict[str, dict[str, Any]] = {
            "long": {"batch_size": sizes.long_batch, "input_len": sizes.long_len, "output_len": sizes.long_output_len},
            "beside": {"batch_size": sizes.beside_batch, "input_len": sizes.beside_len, "output_len": sizes.output_len},
        }
        parts = [{"part": p, **asked[p]} for p in asked if p in self._parts]
        most_seqs = max(sizes.long_batch, sizes.beside_batch + 1)
        run = self._engine(parts, sizes.long_len + _CONTEXT_SPARE, enable_prefix_caching=True, max_num_seqs=most_seqs)
        run.memory.pop("kv")
        self._found |= run.parts
        self._found["memory"]["long contexts"] = run.memory

    def _server(self, folder: Path) -> None:
        subject, sizes = self._subject, self._sizes
        settings = {"max_model_len": sizes.max_model_len, "enable_prefix_caching": False, **subject.settings}
        if not subject.has_tokenizer:
            settings["tokenizer"] = str(write_tokenizer(folder / "tokenizer", subject.spec.vocab_size))
        with serving(subject.model, settings, self._environment) as served:
            workload = workload_named(sizes.workload, subject.spec.vocab_size, sizes.num_seqs)
            self._say(f"{subject.name}: {len(workload.prompts)} streaming clients")
            result = stream_workload(served, workload)
        self._found["memory"]["server"] = result.pop("memory")
        self._found["server"] = result


def _start_of(run: EngineRun) -> dict[str, Any]:
    """Both starts must come to the same cache."""
    return {"ready_s": run.ready_s, "first_token_s": run.first_token_s, "kv_tokens": run.info.get("kv_tokens")}


def failures_of(record: Mapping[str, Any]) -> list[str]:
    """model: part: why, of every part that failed."""
    return [
        f"{name}: {part}: {result['failed']}"
        for name, found in record["models"].items()
        for part, result in found.items()
        if isinstance(result, dict) and "failed" in result
    ]
