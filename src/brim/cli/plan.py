"""`brim plan`: what would happen, without doing it. Owns the verb."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from brim.cli import scenarios
from brim.cli.options import ENGINE_GROUPS, build_config, with_settings

_NO_SETTINGS = ("device", "tokenizer", "chat_template", "seed", "load_format")


@with_settings(groups=ENGINE_GROUPS, without=_NO_SETTINGS)
def plan(
    *,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL...", help="A folder, a .gguf, a config.json, a hub id, or demo; several share the device."),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", metavar="NAME", help="this, h100-80g, cpu:16GiB or a profile's file; repeatable."),
    ] = None,
    scenario: Annotated[
        list[Path] | None,
        typer.Option(
            "--scenario", metavar="FILE", help="Start on the scripted device of this file (docs/scenarios.md); repeatable."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Also draw stacked bars: over devices, or over settings.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="How wrong past plans were, by the certificates in MODEL as a folder, or the cache's.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the tables.")] = False,
    settings: dict[str, Any],
) -> None:
    """Plan the memory of a start, without weights and without the device; or play starts on scripted devices.

    Exit status: 0 all fits (all holds), 1 something does not, 2 wrong usage.
    """
    if scenario:
        scenarios.play(scenario, as_json=as_json)
        return
    if check:
        _check(models or [], as_json)
        return
    if not models:
        print("brim: `brim plan` needs a MODEL, --check or --scenario FILE.", file=sys.stderr)
        raise typer.Exit(scenarios.EXIT_USAGE)
    from brim.planning import plan_starts

    found = plan_starts([build_config(model, settings) for model in models], device or ["this"])
    if plot is not None:
        from brim.cli.plan_plot import draw

        draw(found, plot)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        from brim.cli.plan_report import print_plans

        print_plans(found, sys.stdout)
    sys.stdout.flush()
    if not all(one["fits"] for one in found["plans"]):
        raise typer.Exit(scenarios.EXIT_DID_NOT_HOLD)


def _check(folders: list[str], as_json: bool) -> None:
    from brim.cli.plan_report import print_errors
    from brim.memory.certificate import certificates_folder
    from brim.memory.plan_errors import plan_errors

    for folder in folders or [str(certificates_folder())]:
        found = plan_errors(Path(folder))
        if as_json:
            print(json.dumps(found, indent=2))
        else:
            print_errors(found, sys.stdout)
