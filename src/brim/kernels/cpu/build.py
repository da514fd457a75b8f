"""Compiles the native kernels for this machine. Owns the compiler's flags.

The library is built once for each combination of sources, flags, compiler and processor, in the user's cache directory, and
found there by every later start. `python -m brim.kernels.cpu.build` builds ahead. Needs a C11 compiler only; where there is
none the result says so and the caller falls back.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from brim.platforms.compiled_library import TIMEOUT_S, compiled, find_compiler

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


@dataclass(frozen=True, slots=True)
class BuildResult:
    """Where the library is, or why there is none. `seconds` is what this call took; `built` tells a build from a find."""

    path: Path | None
    reason: str | None
    built: bool
    seconds: float


def build(
    directory: Path | None = None, machine_flags: Sequence[str] | None = None, extra_flags: Sequence[str] = ()
) -> BuildResult:
    """Find or build the library in `directory` (default: the user's cache folder). Never raises for a machine that cannot build.

    machine_flags replaces the search for this machine's own (tests build the portable paths with it).
    """
    started = time.perf_counter()

    def result(path: Path | None, reason: str | None, built: bool) -> BuildResult:
        return BuildResult(path, reason, built, time.perf_counter() - started)

    compiler = find_compiler("CC", _COMPILERS)
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
        path, built = compiled("kernels", command, list(SOURCE_DIR.iterdir()), features, directory, ["-lm"])
    except (OSError, RuntimeError) as error:
        return result(None, f"cannot build native kernels: {error}", False)
    return result(path, None, built)


def _predefined_macros(compiler: str, flags: Sequence[str]) -> bytes | None:
    """All the compiler predefines with these flags: its version and each feature of the processor. None: flags refused."""
    command = [compiler, *flags, "-dM", "-E", "-x", "c", os.devnull]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


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
