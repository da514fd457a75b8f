"""The metrics' names are a promise: the page lists all of them, and dashboard and alerts ask for nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from tests.unit.server.conftest import Api

ROOT = Path(__file__).parents[3]
GRAFANA = ROOT / "deploy" / "grafana"
ROW = re.compile(r"^\| `(brim_\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", re.MULTILINE)


@pytest.fixture
def families(api: Api) -> list[Metric]:
    """What a server that served something shows; *_created are the client library's own."""
    api.complete("hello", max_tokens=3)
    found = text_string_to_metric_families(api.get("/metrics").text)
    return [family for family in found if not family.name.endswith("_created")]


def test_the_page_lists_every_metric_as_it_is(families: list[Metric]) -> None:
    shown = set()
    for family in families:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        shown.add((name, family.type, ", ".join(f"`{label}`" for label in labels) or "-", family.documentation))
    listed = set(ROW.findall((ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")))
    assert listed == shown


def queries() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of the dashboard and of the alerts."""
    for panel in load("dashboard.json")["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel["targets"])
    for variable in load("dashboard.json")["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]
    for rule in rules():
        yield rule["title"], rule["data"][0]["model"]["expr"]


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GRAFANA / name).read_text(encoding="utf-8"))
    return found


def rules() -> list[dict[str, Any]]:
    (group,) = load("alerts.json")["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def test_dashboard_and_alerts_ask_for_what_is_there(families: list[Metric]) -> None:
    known: dict[str, set[str]] = {}
    values: dict[str, set[str]] = {}
    for sample in (sample for family in families for sample in family.samples):
        known.setdefault(sample.name, {"job", "instance"}).update(sample.labels)
        for label, value in sample.labels.items():
            values.setdefault(label, set()).add(value)
    values.setdefault("category", set()).update({"other_processes", "reserve", "free"})  # letters hold none of these
    for where, query in queries():
        names = set(re.findall(r"\bbrim_\w+", query))
        assert names, where
        assert names <= set(known), where
        labels = set().union(*(known[name] for name in names))
        by = {label.strip() for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", query) for label in group.split(",")}
        assert by <= labels, where
        for label, operator, value in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', query):
            assert label in labels, where
            assert value.startswith("$") or set(value.split("|")) <= values[label], (where, operator)
        assert query.count("(") == query.count(")")
        assert query.count("{") == query.count("}")
        assert all(name.endswith(("_total", "_bucket")) for name in re.findall(r"(?:rate|increase)\((\w+)", query)), where


def test_panels_have_their_own_place_and_alerts_their_own_words() -> None:
    cells = [
        (panel["gridPos"]["x"] + dx, panel["gridPos"]["y"] + dy)
        for panel in load("dashboard.json")["panels"]
        for dx in range(panel["gridPos"]["w"])
        for dy in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({rule["uid"] for rule in rules()}) == len(rules())
    for rule in rules():
        assert " bool " in rule["data"][0]["model"]["expr"]  # 0 or 1, which the threshold above 0 looks at
        assert rule["annotations"]["description"].endswith(".")
    named = {rule["uid"] for rule in rules()}
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(brim-[\w-]+)` \|", page, re.MULTILINE)) == named
