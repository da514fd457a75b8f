"""Only platforms/ (and a vendor's kernels) know brands and the operating system's own words; nobody patches other libraries."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from tests.structure.conftest import Module, imports_of, modules, where

MAY_NAME_VENDORS = ("platforms", "kernels.cpu", "kernels.triton", "kernels.cuda", "kernels.rocm", "kernels.xpu", "memory.arena")
VENDOR_MODULES = frozenset({"psutil", "pynvml", "cuda", "hip", "pyhip", "level_zero"})
VENDOR_ATTRIBUTES = frozenset({"torch.cuda", "torch.xpu", "torch.hip", "torch.version.cuda", "torch.version.hip"})
BRANDS = frozenset({"cpu", "cuda", "rocm", "xpu", "hip", "nvidia", "amd", "intel"})
# module -> why it may compare with a brand's name
BRAND_EXCEPTIONS: dict[str, str] = {"kernels.select": "picks a backend by the device type that torch names"}
MUTATORS = frozenset(
    {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "clear", "remove", "discard"}
)


def may_name_vendors(module: Module) -> bool:
    return any(module.name == name or module.name.startswith(f"{name}.") for name in MAY_NAME_VENDORS)


def dotted(node: ast.AST) -> str:
    """`torch.cuda.Stream` of an attribute chain that starts at a name; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def docstrings(tree: ast.Module) -> set[int]:
    """ids of the constants that are docstrings."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found.add(id(first.value))
    return found


def vendor_words(module: Module) -> Iterator[str]:
    texts_for_people = docstrings(module.tree)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and dotted(node) in VENDOR_ATTRIBUTES:
            yield f"{where(module, node.lineno)} names {dotted(node)}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts_for_people:
            if node.value.startswith(("/proc", "/sys/fs/cgroup")):
                yield f"{where(module, node.lineno)} names {node.value}"
        elif isinstance(node, ast.Compare) and module.name not in BRAND_EXCEPTIONS:
            for side in (node.left, *node.comparators):
                if isinstance(side, ast.Constant) and side.value in BRANDS:
                    yield f"{where(module, node.lineno)} asks for the brand {side.value!r}; ask for a capability"


@pytest.mark.parametrize("module", [m for m in modules() if not may_name_vendors(m)], ids=lambda module: module.name)
def test_only_platforms_name_vendors_and_the_operating_system(module: Module) -> None:
    wrong = [
        f"{where(module, entry.line)} imports {entry.target}"
        for entry in imports_of(module)
        if entry.target.split(".")[0] in VENDOR_MODULES or any(entry.target.startswith(name) for name in VENDOR_ATTRIBUTES)
    ]
    assert not [*wrong, *vendor_words(module)]


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.name)
def test_no_other_librarys_attribute_is_assigned(module: Module) -> None:
    foreign = {entry.target.split(".")[0] for entry in imports_of(module) if not entry.target.startswith("brim")}
    aliases = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if not alias.name.startswith("brim")
    }
    wrong = []
    for node in ast.walk(module.tree):
        targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else []
        targets = [node.target] if isinstance(node, (ast.AugAssign, ast.AnnAssign)) else targets
        for target in targets:
            holder = target.value if isinstance(target, ast.Subscript) else target
            if isinstance(holder, ast.Attribute) and dotted(holder).split(".")[0] in foreign & aliases:
                wrong.append(f"{where(module, node.lineno)} assigns {dotted(holder)}")
        if (
            isinstance(node, ast.Call)
            and dotted(node.func) == "setattr"
            and dotted(node.args[0]).split(".")[0] in foreign & aliases
        ):
            wrong.append(f"{where(module, node.lineno)} sets an attribute of {dotted(node.args[0])}")
    assert not wrong


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.name)
def test_no_state_lives_in_a_module(module: Module) -> None:
    """No `global`; a table at module level is a CONSTANT that nothing in its module changes."""
    wrong = [f"{where(module, n.lineno)} uses global" for n in ast.walk(module.tree) if isinstance(n, ast.Global)]
    tables = {}
    for node in module.tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        for target in targets:
            if isinstance(target, ast.Name) and value is not None and is_mutable(value):
                tables[target.id] = node.lineno
    wrong += [
        f"{where(module, line)} {name} is mutable and no CONSTANT" for name, line in tables.items() if not is_constant(name)
    ]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)) and dotted(node.value) in tables:
            wrong.append(f"{where(module, node.lineno)} changes {dotted(node.value)}")
        is_mutator = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS
        if is_mutator and dotted(node.func.value) in tables:
            wrong.append(f"{where(module, node.lineno)} changes {dotted(node.func.value)}")
    assert not wrong


def is_constant(name: str) -> bool:
    return name.upper() == name or name in {"__all__", "__slots__"}


def is_mutable(value: ast.expr) -> bool:
    displays = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    if isinstance(value, ast.Call):
        return dotted(value.func).split(".")[-1] in {
            "list",
            "dict",
            "set",
            "defaultdict",
            "deque",
            "OrderedDict",
            "Counter",
            "bytearray",
        }
    return isinstance(value, displays)
