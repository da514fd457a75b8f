"""The source tree, parsed once, for the tests of the house rules."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "brim"


@dataclass(frozen=True)
class Module:
    """One module of the package. `name` is dotted without the leading `brim.`: `memory.arena.mmap`, `errors`."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def package(self) -> str:
        """The first part of the name: `memory`."""
        return self.name.split(".")[0]

    @property
    def num_lines(self) -> int:
        return len(self.path.read_text(encoding="utf-8").splitlines())

    def functions(self) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        """Every function and method with its dotted name inside the module."""
        yield from _functions(self.tree, "")


@dataclass(frozen=True)
class Import:
    """One import of a module: the dotted target, the line, the function it stands in ("" at the top), for types only or not."""

    target: str
    line: int
    function: str
    only_types: bool


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{prefix}{child.name}", child
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        else:
            yield from _functions(child, prefix)


@functools.cache
def modules() -> tuple[Module, ...]:
    """Every module under src/brim, parsed."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "brim"
        found.append(Module(name, path, ast.parse(path.read_text(encoding="utf-8"), str(path))))
    return tuple(found)


def imports_of(module: Module) -> list[Import]:
    """Every import of `module`; `from brim.x import y` counts as brim.x.y where that is a module, else as brim.x."""
    known = {f"brim.{m.name}" for m in modules()} | {"brim"}
    found: list[Import] = []

    def visit(node: ast.AST, function: str, only_types: bool) -> None:
        # `function` is the dotted name of what encloses the import; a class body alone is as good as the top.
        for child in ast.iter_child_nodes(node):
            inner, types = function, only_types
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inner = f"{function}.{child.name}" if function else child.name
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                types = True
            elif isinstance(child, ast.Import):
                found.extend(Import(alias.name, child.lineno, function, only_types) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = _absolute(module, child)
                for alias in child.names:
                    whole = f"{base}.{alias.name}"
                    found.append(Import(whole if whole in known else base, child.lineno, function, only_types))
            visit(child, inner, types)

    visit(module.tree, "", False)
    return found


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = ["brim", *module.name.split(".")]
    if module.path.name != "__init__.py":
        package = package[:-1]
    package = package[: len(package) - (node.level - 1)]
    return ".".join([*package, *(node.module.split(".") if node.module else [])])


def where(module: Module, line: int) -> str:
    """`src/brim/x.py:12`, for messages."""
    return f"{module.path.relative_to(ROOT)}:{line}"
