"""The closing table of a run of the scenarios: what the reported engine did, what Brim does, KV relative to the optimum."""

from __future__ import annotations

from typing import Any

import pytest

from brim.cli.scenario_table import print_scenarios

PLAYED = pytest.StashKey[dict[str, dict[str, Any]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[PLAYED] = {}


@pytest.fixture
def played(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Where each scenario's document goes, by file name."""
    found: dict[str, dict[str, Any]] = request.config.stash[PLAYED]
    return found


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = [found for _, found in sorted(config.stash[PLAYED].items())]
    if found:
        terminalreporter.section("scenarios")
        print_scenarios(found, terminalreporter, width=120)
