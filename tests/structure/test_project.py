"""The project file, the pins and the generated files agree with the code."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest
from tests.structure.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_torch_is_bounded_on_both_sides_and_pinned_between() -> None:
    (torch,) = [entry for entry in PROJECT["project"]["dependencies"] if re.match(r"torch\b", entry)]
    low, high = re.fullmatch(r"torch>=([0-9.]+),<([0-9.]+)", torch).groups()  # type: ignore[union-attr]
    assert version(low) <= version(PINS["torch"]) < version(high)


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def test_every_dependency_is_pinned() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["demo"], *extras["dev"]]
    pinned = {normal(name) for name in PINS}
    assert not [entry for entry in wanted if normal(re.split(r"[<>=\[;~! ]", entry)[0]) not in pinned]


def test_pins_name_no_local_build() -> None:
    assert not [pin for pin in PINS.values() if "+" in pin or "@" in pin]


def test_the_licence_is_there() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_ci_runs_what_developers_run() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("what", ["surface", "help"])
def test_generated_files_are_current(what: str) -> None:
    """The public surface is a reviewed diff, and the help in the docs is the help of the code; `make format` writes both."""
    script = ROOT / "scripts" / "generate_docs.py"
    done = subprocess.run([sys.executable, str(script), "--check", what], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


# Flags of other programs that the pages mention.
FOREIGN_FLAGS = frozenset({"--check", "--engines", "--host", "--jobs", "--models", "--python", "--json", "--output-len"})


def test_every_flag_the_pages_name_exists() -> None:
    known = set(re.findall(r"--[a-z][a-z-]+", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")))
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    unknown = {
        f"{path.name}: {flag}"
        for path in pages
        if path.exists() and path.name != "log.md"
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text(encoding="utf-8"))
        if flag not in known and flag not in FOREIGN_FLAGS
    }
    assert not unknown
