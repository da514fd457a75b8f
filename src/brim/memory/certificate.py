"""The certificate of a start: what was predicted, what was measured, and how close to the edge it came. Torch-free.

Written as JSON to the cache folder after prove; a later start can compare itself with it. Owns its fields and the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from brim.config.schema import Avoided
from brim.formats.cache_folder import cache_folder
from brim.memory.ledger import CATEGORIES, OURS, Category, Ledger
from brim.memory.plan import MemoryPlan
from brim.memory.profiling import PhaseRecord
from brim.memory.report import report_json

FORMAT_VERSION = 2


@dataclass(frozen=True, slots=True)
class Comparison:
    """One category, predicted before the start and known after it."""

    category: Category
    predicted_bytes: int
    measured_bytes: int

    @property
    def difference_bytes(self) -> int:
        """Measured less predicted."""
        return self.measured_bytes - self.predicted_bytes


def compare(predicted: Ledger, measured: Ledger) -> tuple[Comparison, ...]:
    """Every category of ours that either ledger has, in ledger order."""
    pairs = ((category, predicted.bytes_of(category), measured.bytes_of(category)) for category in CATEGORIES if category in OURS)
    return tuple(Comparison(*pair) for pair in pairs if pair[1] or pair[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """plan is the prediction, outcome what became of it; ledger is the account after prove. peak_ours_bytes: the most held while
    proving.

    low_water_bytes: the least free memory during prove, the reserve's real size. avoided: what this start did without because
    it ended an earlier one.
    """

    plan: MemoryPlan
    outcome: MemoryPlan
    ledger: Ledger
    phases: tuple[PhaseRecord, ...]
    peak_ours_bytes: int
    low_water_bytes: int
    settings: Mapping[str, object]
    sources: Mapping[str, str]
    device: Mapping[str, object]
    versions: Mapping[str, str]
    avoided: tuple[Avoided, ...] = ()

    @property
    def holds(self) -> bool:
        """The peak kept the cap."""
        return self.peak_ours_bytes <= self.ledger.cap_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        lines = [
            {
                "category": c.category,
                "predicted_bytes": c.predicted_bytes,
                "measured_bytes": c.measured_bytes,
                "difference_bytes": c.difference_bytes,
            }
            for c in compare(self.plan.ledger, self.ledger)
        ]
        return {
            "format_version": FORMAT_VERSION,
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "holds": self.holds,
            "peak_bytes": self.peak_ours_bytes,
            "low_water_bytes": self.low_water_bytes,
            **report_json(self.outcome, self.ledger, self.phases),
            "planned": report_json(self.plan, self.plan.ledger),
            "predicted_and_measured": lines,
            "settings": {name: {"value": value, "source": self.sources.get(name, "")} for name, value in self.settings.items()},
            "device": dict(self.device),
            "versions": dict(self.versions),
            "avoided": [asdict(one) for one in self.avoided],
        }

    def write(self, folder: Path, name: str = "certificate") -> Path:
        """Write `folder/name-DIGEST.json` in one step (a reader never sees half of it); returns the path.

        The digest is of the settings: starts with other settings keep certificates of their own."""
        settings = json.dumps(dict(self.settings), sort_keys=True, default=str)
        name = f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.json"
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(self.to_json(), indent=2, default=str) + "\n", encoding="utf-8")
        temporary.replace(path)
        return path


def certificates_folder() -> Path:
    """Where every start leaves its certificate."""
    return cache_folder() / "certificates"


def low_water_bytes(phases: Sequence[PhaseRecord], names: Sequence[str] = ("prove",)) -> int:
    """The least that was free at the peaks of those phases: free afterwards less what was held for a while more."""
    chosen = [p for p in phases if p.name in names] or list(phases[-1:])
    return min((p.after.reading.free_bytes - (p.peak_ours_bytes - p.after.reading.ours_bytes) for p in chosen), default=0)
