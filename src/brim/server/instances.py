"""The servers of this user on this machine, for `brim ps`. Owns one small file a server, which holds nothing after its end.

The file is locked while its server lives, so one left by a crash is known for what it is and removed. It holds a key of its
own that the server accepts, so that `brim ps` needs none of the users'; folder and file are the user's alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Literal

import msgspec

State = Literal["starting", "serving", "stopping"]


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """What a server says of itself. started_at: seconds since 1970."""

    pid: int
    name: str
    url: str
    started_at: float
    state: State = "starting"
    key: str = ""

    @property
    def uptime_s(self) -> float:
        """Since its start."""
        return max(0.0, time.time() - self.started_at)


class InstanceFile:
    """This server's file, from `open` to `close`."""

    def __init__(self, path: Path, file: IO[bytes], instance: Instance) -> None:
        self._path = path
        self._file = file
        self.instance = instance
        self._write()

    @classmethod
    def open(cls, name: str, url: str, folder: Path | None = None) -> InstanceFile | None:
        """Tell that this process serves at `url`; None where no file can be written: serving goes on without."""
        instance = Instance(pid=os.getpid(), name=name, url=url, started_at=time.time(), key=secrets.token_urlsafe(24))
        try:
            path = _make_folder(folder or instances_folder()) / f"{instance.pid}-{secrets.token_hex(4)}.json"
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "r+b")
        except OSError:
            return None
        fcntl.flock(file, fcntl.LOCK_EX)
        return cls(path, file, instance)

    def set_state(self, state: State) -> None:
        """Tell what it does now."""
        self.instance = msgspec.structs.replace(self.instance, state=state)
        self._write()

    def close(self) -> None:
        """Remove it."""
        self._path.unlink(missing_ok=True)
        self._file.close()

    def _write(self) -> None:
        data = msgspec.json.encode(self.instance)
        self._file.seek(0)
        self._file.write(data)
        self._file.truncate(len(data))
        self._file.flush()


def instances_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Where this user's files lie: below XDG_RUNTIME_DIR, or in the folder for temporary files."""
    runtime = (environment if environment is not None else os.environ).get("XDG_RUNTIME_DIR")
    return Path(runtime) / "brim" if runtime else Path(tempfile.gettempdir()) / f"brim-{os.getuid()}"


def list_instances(folder: Path | None = None) -> list[Instance]:
    """The servers that live, oldest first; files of those that do not are removed."""
    found = []
    folder = folder or instances_folder()
    if not _is_ours(folder):
        return []
    for path in sorted(folder.glob("*.json")):
        instance = _read(path)
        if instance is not None:
            found.append(instance)
    return sorted(found, key=lambda instance: instance.started_at)


def _read(path: Path) -> Instance | None:
    try:
        with path.open("rb") as file:
            if _is_abandoned(file):
                path.unlink(missing_ok=True)
                return None
            return msgspec.json.decode(file.read(), type=Instance)
    except (OSError, msgspec.MsgspecError):
        return None


def _is_abandoned(file: IO[bytes]) -> bool:
    """Nobody holds its lock. A file just made is not locked yet, but still empty."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return os.fstat(file.fileno()).st_size > 0


def _make_folder(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours(folder):
        raise PermissionError(f"{folder} belongs to somebody else")
    return folder


def _is_ours(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        status = folder.stat(follow_symlinks=False)
        return status.st_uid == os.getuid() and not status.st_mode & 0o022
    return False
