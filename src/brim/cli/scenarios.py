"""`brim plan --scenario`: starts on scripted devices. Owns what is played, printed and returned."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from brim.cli.errors import report_error
from brim.cli.scenario_table import print_scenario, print_scenarios
from brim.errors import ConfigError

EXIT_DID_NOT_HOLD = 1
EXIT_USAGE = 2


def play(files: Sequence[Path], *, as_json: bool) -> None:
    """Play each file and say what came of it. Exits with 1 where something does not hold, 2 where a file is wrong."""
    from brim.planning import play_scenario

    try:
        found = [{"file": str(path), **play_scenario(path)} for path in files]
    except ConfigError as error:
        report_error(error)
        raise typer.Exit(EXIT_USAGE) from None
    if as_json:
        print(json.dumps(found, indent=2))
    elif len(found) == 1:
        print_scenario(found[0], sys.stdout)
    else:
        print_scenarios(found, sys.stdout)
    sys.stdout.flush()
    if not all(one["ok"] for one in found):
        raise typer.Exit(EXIT_DID_NOT_HOLD)
