"""One noun a file, and small: about 400 lines a file and 60 a function. Exceptions are listed by name, with their reason."""

from __future__ import annotations

import pytest
from tests.structure.conftest import PACKAGE, ROOT, Module, modules

MOST_FILE_LINES = 400
MOST_FUNCTION_LINES = 60
# name -> why it may be longer
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.name)
def test_functions_are_short(module: Module) -> None:
    long = [
        f"{module.name}:{name} has {length} lines"
        for name, node in module.functions()
        if (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MOST_FUNCTION_LINES
        and f"{module.name}:{name}" not in LONG_FUNCTIONS
    ]
    assert not long


def test_files_are_short() -> None:
    folders = (PACKAGE, ROOT / "tests", ROOT / "benchmarks", ROOT / "scripts")
    files = [path for folder in folders for suffix in ("*.py", "*.c", "*.h", "*.sh") for path in sorted(folder.rglob(suffix))]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    long = {name: length for name, length in lengths.items() if length > MOST_FILE_LINES and name not in LONG_FILES}
    assert not long


def test_the_exceptions_are_still_needed() -> None:
    functions = {f"{m.name}:{name}" for m in modules() for name, _ in m.functions()}
    assert set(LONG_FUNCTIONS) <= functions
    assert all((ROOT / name).exists() for name in LONG_FILES)
