"""`brim plan`: what would happen, without doing it. Owns the verb."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

EXIT_DID_NOT_HOLD = 1
EXIT_USAGE = 2


def plan(
    scenario: Annotated[
        list[Path] | None,
        typer.Option(
            "--scenario", metavar="FILE", help="Start on the scripted device of this file (docs/scenarios.md); repeatable."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the tables.")] = False,
) -> None:
    """Play starts on scripted devices: does it start, how many KV tokens, and does what the file expects hold.

    Exit status: 0 all holds, 1 something does not, 2 wrong usage.
    """
    if not scenario:
        print("brim: `brim plan` needs --scenario FILE.", file=sys.stderr)
        raise typer.Exit(EXIT_USAGE)
    from brim.cli.scenario_table import print_scenario, print_scenarios
    from brim.runtime import play_scenario

    found = [{"file": str(path), **play_scenario(path)} for path in scenario]
    if as_json:
        print(json.dumps(found, indent=2))
    elif len(found) == 1:
        print_scenario(found[0], sys.stdout)
    else:
        print_scenarios(found, sys.stdout)
    sys.stdout.flush()
    if not all(one["ok"] for one in found):
        raise typer.Exit(EXIT_DID_NOT_HOLD)
