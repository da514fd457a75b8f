"""`brim doctor`: what this machine is, what its platform really does, and what start-up would do. Owns the verb and its document.

All work on a device happens in processes of its own (`engine.trials`), so that one that hangs or dies is a finding.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from brim.cli.errors import report_error
from brim.cli.options import ENGINE_GROUPS, build_config, with_settings
from brim.cli.progress import ProgressLine
from brim.config.avoid_record import forget_records, list_records, record_json
from brim.config.schema import BrimConfig
from brim.engine.messages import StartupProgress
from brim.engine.trials import TrialEnd, TrialStep, run_trials
from brim.errors import ConfigError

EXIT_FOUND_PROBLEMS = 1
EXIT_USAGE = 2
_PLATFORMS = (sys.executable, "-m", "brim.worker.platform_trial")
_CHECKS = (sys.executable, "-m", "brim.worker.conformance")
_NO_MODEL = "none"


@with_settings(groups=ENGINE_GROUPS, without=("tokenizer", "chat_template", "seed"))
def doctor(
    *,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Also say what starting this model would do; no weight is read.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the tables.")] = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="Only forget what starts do without because it ended an engine: it is tried again.")
    ] = False,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Only measure this machine's profile for `brim plan`; MODEL names its file."),
    ] = False,
    settings: dict[str, Any],
) -> None:
    """Check this machine: what each reading says, what the platform really does, what start-up would do and why.

    Every capability the platform declares is tried, in processes of its own. Exit status: 0 all is well, 1 a check failed or
    the start would be refused, 2 wrong usage.
    """
    if forget:
        _forget(as_json)
        return
    if calibrate:
        _calibrate(model, settings, as_json)
        return
    try:
        config = build_config(model or _NO_MODEL, settings)
        with ProgressLine(quiet=as_json or not sys.stderr.isatty()) as progress:
            found = examine(config, model, settings, lambda step: progress(StartupProgress("doctor", step.name)))
    except ConfigError as error:
        report_error(error)
        raise typer.Exit(EXIT_USAGE) from None
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        from brim.cli.doctor_report import print_report

        print_report(found, sys.stdout)
    sys.stdout.flush()
    if not found["ok"]:
        raise typer.Exit(EXIT_FOUND_PROBLEMS)


def _forget(as_json: bool) -> None:
    gone = [str(path) for path in forget_records()]
    if as_json:
        print(json.dumps({"forgotten": gone}, indent=2))
        return
    count = "1 record" if len(gone) == 1 else f"{len(gone)} records"
    print(f"Forgot {count} of what starts do without; the next start tries it again." if gone else "There was nothing to forget.")


def _calibrate(file: str | None, settings: dict[str, Any], as_json: bool) -> None:
    from brim.cli.doctor_report import print_profile
    from brim.planning import calibrate

    device = build_config(_NO_MODEL, settings).device.device
    with ProgressLine(quiet=as_json or not sys.stderr.isatty()) as progress:
        found = calibrate(Path(file) if file else None, device, progress)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_profile(found, sys.stdout)


def examine(
    config: BrimConfig, model: str | None, settings: dict[str, Any], on_begin: Callable[[TrialStep], None]
) -> dict[str, Any]:
    """The whole document of `--json`. Raises ConfigError for a device nobody knows."""
    started = time.perf_counter()
    platforms = [_platform(end) for end in run_trials(_PLATFORMS, {}, on_begin=on_begin)]
    device = config.device.device
    if device != "auto" and device not in {row["name"] for row in platforms}:
        names = ", ".join(sorted(row["name"] for row in platforms))
        raise ConfigError(f"--device {device} is not installed here; this installation has {names}.")
    found: dict[str, Any] = {"ok": False, "platforms": platforms, "machine": None, "readings": None, "start": None, "checks": []}
    problems = []
    for end in run_trials(_CHECKS, _task(model, settings), on_begin=on_begin):
        if end.step.facts:
            found["checks"].append(_check(end))
        elif end.value is not None:
            found[end.step.name] = end.value
        elif end.tried:
            problems.append(f"{end.step.name}: {end.why}.")
        elif end.why not in problems:
            problems.append(end.why)
    found["contradictions"] = contradictions(found)
    found["avoided"] = [record_json(path, record) for path, record in list_records()]
    found["problems"] = problems
    refused = (found["start"] or {}).get("refused")
    failed = [check for check in found["checks"] if check["outcome"] == "failed"]
    found["ok"] = not problems and not failed and refused is None and found["machine"] is not None
    found["seconds"] = round(time.perf_counter() - started, 2)
    return found


def contradictions(found: dict[str, Any]) -> list[dict[str, str]]:
    """What the platform declares and a check saw fail, with the flags that start without it."""
    declared = (found["machine"] or {}).get("capabilities", {})
    return [
        {key: check[key] for key in ("capability", "name", "reason", "workaround")}
        for check in found["checks"]
        if check["outcome"] == "failed" and declared.get(check["capability"])
    ]


def _task(model: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What the process is told: the flags as typed, and the environment and file that belong to them."""
    flags = {key: value for key, value in settings.items() if key != "config"}
    return {
        "model": model,
        "settings": flags,
        "environment": {name: value for name, value in os.environ.items() if name.startswith("BRIM_")},
        "config_file": settings.get("config") or os.environ.get("BRIM_CONFIG") or None,
    }


def _platform(end: TrialEnd) -> dict[str, Any]:
    if end.value is not None:
        return end.value
    return {"name": end.step.name, "opened": False, "reason": f"Opening it: {end.why}."}


def _check(end: TrialEnd) -> dict[str, Any]:
    """A check's result; one that took its process down failed, one that was never begun was not tried."""
    if end.value is not None:
        return end.value
    if end.tried:
        return {**end.step.facts, "reason": end.why}
    return {**end.step.facts, "outcome": "not_tried", "reason": end.why, "workaround": ""}
