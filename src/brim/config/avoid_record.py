"""The files that remember which features kill the engine here: one a platform, driver, versions and model. Owns key and form."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from brim.config.avoid import merge
from brim.config.schema import Avoided, ModelConfig
from brim.formats.cache_folder import cache_folder

FORMAT_VERSION = 1
_LARGEST_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class AvoidRecord:
    """identity: what it holds for, see `identity_of`. written: UTC, as text."""

    identity: dict[str, str]
    avoided: tuple[Avoided, ...]
    written: str = ""
    format_version: int = FORMAT_VERSION

    @property
    def name(self) -> str:
        """Of its file, without a folder."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        words = re.sub(r"[^A-Za-z0-9.-]+", "-", f"{self.identity.get('platform', '')}-{self.identity.get('model', '')}")
        return f"{words.strip('-.')[-80:].strip('-.')}-{digest}.json"


def identity_of(
    platform: str, described: Mapping[str, object], versions: Mapping[str, str], model: ModelConfig
) -> dict[str, str]:
    """What decides whether a feature works: the device, its driver, the software, the model and how it is read.

    described: the platform's own words (`device`, `driver`, and `system` on a host).
    """
    device = {key: str(described[key]) for key in ("device", "driver", "system") if key in described}
    read = {"revision": model.revision or "", "load_format": model.load_format, "dtype": model.dtype}
    return {"platform": platform, **device, **versions, "model": model.model, **read}


def records_folder() -> Path:
    """Not created here."""
    return cache_folder() / "avoid"


def read_record(identity: Mapping[str, str], folder: Path | None = None) -> tuple[Avoided, ...]:
    """What is known for this identity; nothing where there is no file, or one that cannot be read."""
    wanted = AvoidRecord(dict(identity), ())
    found = _read((folder or records_folder()) / wanted.name)
    return found.avoided if found is not None and found.identity == wanted.identity else ()


def write_record(identity: Mapping[str, str], avoided: tuple[Avoided, ...], folder: Path | None = None) -> Path | None:
    """Add to what is known, in one step (a reader never sees half of it); the path, None where it cannot be written."""
    where = folder or records_folder()
    record = AvoidRecord(dict(identity), merge(read_record(identity, where), avoided))
    record = replace(record, written=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    path = where / record.name
    temporary = where / f".{record.name}.{os.getpid()}.tmp"
    try:
        where.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return None
    return path


def list_records(folder: Path | None = None) -> list[tuple[Path, AvoidRecord]]:
    """All that can be read, by path."""
    return [(path, record) for path in _files(folder) if (record := _read(path)) is not None]


def forget_records(folder: Path | None = None) -> list[Path]:
    """Delete them all, those that cannot be read too; what was deleted."""
    gone = []
    for path in _files(folder):
        with contextlib.suppress(OSError):
            path.unlink()
            gone.append(path)
    return gone


def record_json(path: Path, record: AvoidRecord) -> dict[str, Any]:
    """Plain values, for reports."""
    return {"path": str(path), **msgspec.to_builtins(record)}


def _files(folder: Path | None) -> list[Path]:
    return sorted((folder or records_folder()).glob("*.json"))


def _read(path: Path) -> AvoidRecord | None:
    try:
        with path.open("rb") as file:
            record = msgspec.json.decode(file.read(_LARGEST_BYTES), type=AvoidRecord)
    except (OSError, ValueError):
        return None
    return record if record.format_version == FORMAT_VERSION else None
