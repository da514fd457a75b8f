"""`brim plan`: what would happen, without doing it. Owns the verb."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from brim.cli import scenarios


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
        raise typer.Exit(scenarios.EXIT_USAGE)
    scenarios.play(scenario, as_json=as_json)
