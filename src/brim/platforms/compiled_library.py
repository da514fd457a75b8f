"""Shared libraries compiled on this machine. Owns the search for a compiler and the folder where a build is found again."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from brim.formats.cache_folder import cache_folder, users_cache_folder

TIMEOUT_S = 120
_FOLDER = "kernels"


def find_compiler(variable: str, names: Sequence[str]) -> str | None:
    """The compiler that the environment variable asks for, else the first of names there is."""
    wanted = os.environ.get(variable, "").split()[:1]
    return next((found for name in (*wanted, *names) if (found := shutil.which(name))), None)


def compiled(
    name: str,
    command: Sequence[str],
    sources: Sequence[Path],
    key: bytes,
    folder: Path | None = None,
    libraries: Sequence[str] = (),
) -> tuple[Path, bool]:
    """The library that `command` makes of sources, and whether it was built now; found where it was built before.

    folder: where it is built (the cache folder); looked for in the user's own cache too, where set-up builds ahead. key: what
    else decides what is built (compiler, processor). Raises RuntimeError with the compiler's first error, OSError.
    """
    digest = hashlib.sha256()
    for source in sorted(sources):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update(" ".join((*command, *libraries)).encode() + b"\0" + key)
    folder = cache_folder() / _FOLDER if folder is None else folder
    path = folder / f"{name}-{digest.hexdigest()[:24]}.so"
    for place in (path, users_cache_folder() / _FOLDER / path.name):
        if place.exists():
            return place, False
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when this process ends, however it ends
        if path.exists():
            return path, False
        _compile([*command], path, [str(source) for source in sorted(sources) if source.suffix in (".c", ".cpp")], libraries)
    return path, True


def _compile(command: Sequence[str], path: Path, sources: Sequence[str], libraries: Sequence[str]) -> None:
    """Compile to a temporary file and rename it into place: no reader ever sees half a library."""
    handle, name = tempfile.mkstemp(prefix=path.stem, suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        done = subprocess.run(
            [*command, "-o", name, *sources, *libraries], capture_output=True, timeout=TIMEOUT_S, check=False, text=True
        )
        if done.returncode != 0:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
            raise RuntimeError(f"{command[0]} failed: {first}")
        temporary.replace(path)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{command[0]} took more than {TIMEOUT_S} s") from error
    finally:
        temporary.unlink(missing_ok=True)
