"""Every module says what it owns; every public class and function says what it is."""

from __future__ import annotations

import ast

import pytest
from tests.structure.conftest import Module, modules, where


def is_public(name: str) -> bool:
    return not name.startswith("_")


def missing_in(module: Module, body: list[ast.stmt], owner: str, *, contract_elsewhere: bool) -> list[str]:
    """Public definitions without a docstring. A method of a class with a base may take its contract from there."""
    missing = []
    for node in body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) or not is_public(node.name):
            continue
        is_setter = any(isinstance(d, ast.Attribute) and d.attr in {"setter", "overload"} for d in node.decorator_list)
        if ast.get_docstring(node) is None and not contract_elsewhere and not is_setter:
            missing.append(f"{where(module, node.lineno)} {owner}{node.name}")
        if isinstance(node, ast.ClassDef):
            missing += missing_in(module, node.body, f"{node.name}.", contract_elsewhere=bool(node.bases))
    return missing


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.name)
def test_public_things_say_what_they_are(module: Module) -> None:
    if module.tree.body:
        assert ast.get_docstring(module.tree), f"{where(module, 1)} has no docstring"
    assert not missing_in(module, module.tree.body, "", contract_elsewhere=False)
