"""How wrong the plans of past starts were, by their certificates. Owns what `brim plan --check` says. Torch-free."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from brim.errors import ConfigError
from brim.memory.certificate import FORMAT_VERSION
from brim.memory.ledger import CATEGORIES


@dataclass(frozen=True, slots=True)
class PlanError:
    """One start. lines: category -> measured less predicted bytes."""

    file: str
    device: str
    written: str
    memory: str
    predicted_tokens: int
    real_tokens: int
    predicted_cap_bytes: int
    real_cap_bytes: int
    lines: dict[str, int]

    @property
    def error(self) -> float:
        """(real - predicted) / real KV tokens: positive where the start gave more than the plan said."""
        return (self.real_tokens - self.predicted_tokens) / self.real_tokens


def plan_errors(folder: Path) -> dict[str, Any]:
    """The document of `brim plan --check --json`: every stored start and, for each device, median and worst.

    Raises ConfigError where there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"There are no certificates in {folder}; every start writes one: start a model, or name another folder."
        )
    rows: list[PlanError] = []
    skipped = []
    for path in sorted(folder.glob("*.json")):
        row = _read(path)
        if row is None:
            skipped.append(path.name)
        else:
            rows.append(row)
    devices = [_summary(name, [row for row in rows if row.device == name]) for name in dict.fromkeys(row.device for row in rows)]
    starts = [{**asdict(row), "error": row.error} for row in rows]
    return {"folder": str(folder), "devices": devices, "starts": starts, "skipped": skipped}


def _read(path: Path) -> PlanError | None:
    """None for a file of another format, or of none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format_version"] != FORMAT_VERSION or not found["kv"]["tokens"]:
            return None
        return PlanError(
            file=path.name,
            device=str(found["device"].get("device", "unknown")),
            written=str(found["written"]),
            memory=str(found["memory"]),
            predicted_tokens=found["planned"]["kv"]["tokens"],
            real_tokens=found["kv"]["tokens"],
            predicted_cap_bytes=found["planned"]["cap_bytes"],
            real_cap_bytes=found["cap_bytes"],
            lines={line["category"]: line["difference_bytes"] for line in found["predicted_and_measured"]},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _summary(device: str, rows: Sequence[PlanError]) -> dict[str, Any]:
    errors = [abs(row.error) for row in rows]
    worst = max(rows, key=lambda row: abs(row.error))
    lines = {category: [row.lines[category] for row in rows if category in row.lines] for category in CATEGORIES}
    return {
        "device": device,
        "starts": len(rows),
        "median_error": statistics.median(errors),
        "worst_error": abs(worst.error),
        "worst_file": worst.file,
        "gave_fewer_tokens": sum(row.error < 0 for row in rows),
        "lines": [{"category": name, **_spread(values)} for name, values in lines.items() if values],
    }


def _spread(differences: Iterable[int]) -> dict[str, int]:
    ordered = sorted(differences)
    return {
        "starts": len(ordered),
        "median_bytes": int(statistics.median(ordered)),
        "worst_bytes": max(ordered, key=abs),
    }
