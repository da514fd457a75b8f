"""What starts would come to: plans, scenarios on scripted devices, and this machine's profile. Owns putting those together, of
the parts and the engine that `runtime` knows."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from brim.config.resolve import resolve
from brim.config.schema import BrimConfig
from brim.engine.messages import StartupProgress
from brim.errors import ConfigError, DeviceError
from brim.platforms.base import Platform
from brim.platforms.detect import registered
from brim.platforms.profile import calibrated_folder
from brim.platforms.scenario import read_scenario
from brim.runtime import EngineParts, build_engine_core, core_over, without_what_died
from brim.worker.device_worker import DeviceWorker
from brim.worker.plan_calibration import FIRST_START, later_starts, measured_start, profile_from, start_json, start_of_json
from brim.worker.plan_device import plan_device
from brim.worker.plan_preview import PlannedModel, open_planned, plan_model, plan_together
from brim.worker.scripted_run import run_scenario
from brim.worker.scripted_verdict import verdict_json


def play_scenario(path: Path) -> dict[str, Any]:
    """What Brim does on the scripted device of a file, and what it should have done (docs/scenarios.md). Raises ConfigError."""
    scenario = read_scenario(path)
    return verdict_json(scenario, run_scenario(scenario, core_over))


def plan_starts(configs: Sequence[BrimConfig], devices: Sequence[str], parts: EngineParts | None = None) -> dict[str, Any]:
    """What starts of these models would come to on each of these devices (docs/planning.md); several models share a device.

    Raises ModelError, ConfigError, DeviceError, and MemoryBudgetError where several models do not fit together."""
    parts, started = parts or EngineParts(), time.perf_counter()
    known = [plan_device(name, parts.detect, set(registered()) - {"auto"}) for name in devices]
    plans = []
    with ExitStack() as stack:
        opened = [stack.enter_context(closing(open_planned(config))) for config in configs]
        for device in known:
            models = opened
            if device.live is not None:
                models = [_as_it_starts(one, config, device.live) for one, config in zip(opened, configs, strict=True)]
            plans += [plan_model(models[0], device)] if len(models) == 1 else plan_together(models, device)
    return {"plans": plans, "seconds": round(time.perf_counter() - started, 3)}


def measure_start(settings: dict[str, Any]) -> dict[str, Any]:
    """Start once and say what that took, for `calibrate`. Raises BrimError."""
    core, _ = build_engine_core(resolve(settings), lambda progress: None)
    worker = core.executor
    assert isinstance(worker, DeviceWorker), "build_engine_core starts one"
    try:
        return start_json(measured_start(worker))
    finally:
        worker.close()


def calibrate(path: Path | None, device: str, on_progress: Callable[[StartupProgress], None]) -> dict[str, Any]:
    """Measure this machine's profile by starting small models, each in a process of its own, and write it to path, or where plans
    find it. Raises DeviceError where no start came to be, ConfigError where the file cannot be written."""
    starts, failures = [], []
    todo = [FIRST_START]
    with tempfile.TemporaryDirectory() as folder:
        while todo:
            start = todo.pop(0)
            text = f"{start.num_layers} layers, at most {start.max_num_seqs} sequences, graphs {start.graph_mode}"
            on_progress(StartupProgress("calibrate", text))
            config_path = Path(folder) / "config.json"
            config_path.write_text(json.dumps(start.model), encoding="utf-8")
            task = json.dumps({"model": str(config_path), "device": device, **start.settings})
            command = [sys.executable, "-m", "brim.calibration_main"]
            done = subprocess.run(command, input=task, capture_output=True, text=True, check=False)
            if done.returncode:
                failures.append(f"{text}: {(done.stderr.strip().splitlines() or ['it died'])[-1]}")
            else:
                starts.append(start_of_json(json.loads(done.stdout.splitlines()[-1])))
                todo = todo if start is not FIRST_START else list(later_starts(starts[0]))
    if not starts:
        raise DeviceError(f"No start came to be, so nothing was measured. {failures[0]}")
    profile = profile_from(starts, time.strftime("%Y-%m-%d"))
    path = path or calibrated_folder() / f"{profile.name}.toml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(profile.to_toml(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The profile cannot be written to {path}: {error.strerror}.") from error
    figures = {name: asdict(figure) for name, figure in profile.figures.items()}
    return {"profile": profile.name, "file": str(path), "figures": figures, "starts": len(starts), "failures": failures}


def _as_it_starts(planned: PlannedModel, config: BrimConfig, platform: Platform) -> PlannedModel:
    """Without what died in a start of this configuration; its shapes are read as for any plan."""
    return replace(planned, config=replace(without_what_died(config, platform)[0], model=planned.config.model))
