"""Compiles the native kernels for this machine. Owns the compiler's flags and the cache of built libraries.

The library is built once for each combination of sources, flags, compiler and processor, in the user's cache directory, and
found there by every later start. `python -m brim.kernels.cpu.build` builds ahead. Needs a C11 compiler only; where there is
none the result says so and the caller falls back.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE_DIR = Path(__file__).parent / "csrc"
_FLAGS = [
    "-std=gnu11",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-shared",
    "-fPIC",
    "-pthread",
    "-Wno-psabi",
]
_NATIVE_FLAG_SETS: tuple[list[str], ...] = (
    ["-march=native", "-mprefer-vector-width=512"],
    ["-march=native"],
    ["-mcpu=native"],
    [],
)
_COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class BuildResult:
    """Where the library is, or why there is none. `seconds` is what this call took; `built` tells a build from a find."""

    path: Path | None
    reason: str | None
    built: bool
    seconds: float


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/brim/kernels, or ~/.cache/brim/kernels."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "brim" / "kernels"


def build(
    directory: Path | None = None, machine_flags: Sequence[str] | None = None, extra_flags: Sequence[str] = ()
) -> BuildResult:
    """Find or build the library in `directory` (default `cache_dir()`). Never raises for a machine that cannot build.

    machine_flags replaces the search for this machine's own (tests build the portable paths with it).
    """
    started = time.perf_counter()

    def result(path: Path | None, reason: str | None, built: bool) -> BuildResult:
        return BuildResult(path, reason, built, time.perf_counter() - started)

    compiler = _find_compiler()
    if compiler is None:
        return result(None, "no C compiler found (tried $CC, cc, gcc, clang)", False)
    candidates = _NATIVE_FLAG_SETS if machine_flags is None else (list(machine_flags),)
    for flags in candidates:
        features = _predefined_macros(compiler, flags)
        if features is not None:
            break
    else:
        return result(None, f"{compiler} accepts none of the target flags tried", False)
    command = [compiler, *_FLAGS, *flags, *extra_flags]
    try:
        target_dir = cache_dir() if directory is None else directory
        target_dir.mkdir(parents=True, exist_ok=True)
        path = target_dir / f"kernels-{_key(command, features)}.so"
        if path.exists():
            return result(path, None, False)
        with _Lock(target_dir / "build.lock"):
            if path.exists():
                return result(path, None, False)
            failure = _compile(command, path)
    except (OSError, RuntimeError) as error:
        return result(None, f"cannot build native kernels: {error}", False)
    return result(None, failure, False) if failure else result(path, None, True)


class _Lock:
    """An exclusive lock between processes; released when the process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._file = self._path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def _find_compiler() -> str | None:
    wanted = os.environ.get("CC", "").split()[:1]
    return next((found for name in (*wanted, *_COMPILERS) if (found := shutil.which(name))), None)


def _predefined_macros(compiler: str, flags: Sequence[str]) -> bytes | None:
    """All the compiler predefines with these flags: its version and each feature of the processor. None: flags refused."""
    command = [compiler, *flags, "-dM", "-E", "-x", "c", os.devnull]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _key(command: Sequence[str], features: bytes) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCE_DIR.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update(" ".join(command).encode() + b"\0" + features)
    return digest.hexdigest()[:24]


def _compile(command: Sequence[str], path: Path) -> str | None:
    """Compile to a temporary file and rename it into place: no reader ever sees half a library. Returns the failure."""
    handle, name = tempfile.mkstemp(prefix=path.stem, suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        sources = [str(source) for source in sorted(SOURCE_DIR.glob("*.c"))]
        done = subprocess.run(
            [*command, "-o", name, *sources, "-lm"], capture_output=True, timeout=_TIMEOUT_S, check=False, text=True
        )
        if done.returncode != 0:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
            return f"{command[0]} failed: {first}"
        temporary.replace(path)
    except subprocess.TimeoutExpired:
        return f"{command[0]} took more than {_TIMEOUT_S} s"
    finally:
        temporary.unlink(missing_ok=True)
    return None


def main() -> int:
    """Build ahead and say what happened; exit status 1 where there is no compiler."""
    result = build()
    if result.path is None:
        print(f"native kernels: not built: {result.reason}", file=sys.stderr)
        return 1
    verb = "built" if result.built else "found"
    print(f"native kernels: {verb} in {result.seconds:.1f} s: {result.path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
