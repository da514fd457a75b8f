"""Imports go one way."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests.structure.conftest import Import, Module, imports_of, modules, where

FOUNDATION = ("errors", "units")
# package -> what it may import beside itself. Left never imports right: errors, units < formats < config < platforms <
# memory, parallel < kernels < layers < models; text after config; the engine beside all that, torch-free.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "units": ("errors",),
    "importing": ("platforms",),
    "formats": FOUNDATION,
    "config": (*FOUNDATION, "formats"),
    "text": (*FOUNDATION, "formats", "config"),
    "platforms": (*FOUNDATION, "formats", "config"),
    "memory": (*FOUNDATION, "formats", "config", "platforms"),
    "parallel": (*FOUNDATION, "formats", "config", "platforms"),
    "kernels": (*FOUNDATION, "formats", "config", "platforms", "memory", "parallel"),
    "layers": (*FOUNDATION, "formats", "config", "platforms", "memory", "parallel", "kernels"),
    "models": (*FOUNDATION, "formats", "config", "platforms", "memory", "parallel", "kernels", "layers"),
    "engine": (*FOUNDATION, "config", "memory", "text"),
    "worker": (*FOUNDATION, "formats", "config", "platforms", "memory", "parallel", "kernels", "layers", "models", "engine"),
    # The text side of a model, for whoever talks to callers: LLM and the server.
    "front": (*FOUNDATION, "formats", "config", "text", "engine"),
    "server": (*FOUNDATION, "config", "memory", "text", "engine", "front"),
    # The only composition root: it alone sees everything below the front ends.
    "runtime": (*FOUNDATION, "formats", "config", "text", "platforms", "memory", "parallel", "kernels", "layers", "models",
                "engine", "worker"),
    # Plans, scenarios and calibrating, of the same parts: what a start need not import.
    "planning": (*FOUNDATION, "config", "platforms", "engine", "worker", "runtime"),
    # Looks at the machine for who needs no engine.
    "machine": (*FOUNDATION, "platforms"),
    "llm": (*FOUNDATION, "config", "memory", "text", "engine", "front", "runtime"),
    "brim": (*FOUNDATION, "importing", "engine", "llm"),
    "cli": (*FOUNDATION, "importing", "config", "memory", "engine", "server", "machine", "runtime", "planning", "llm", "brim"),
    "engine_main": ("importing", "engine", "runtime"),
    "calibration_main": ("planning",),
    "__main__": ("cli",),
}  # fmt: skip

# Factories of optional parts, which may import where they are called: "module:function" -> why.
FACTORIES: dict[str, str] = {
    "brim:__getattr__": "importing the package stays instant",
    "engine_main:main": "the garbage collector rests while it imports",
    "formats.model_files:_download_folder": "the hub's client is slow to import and needed for hub ids only",
    "formats.model_files:_download_file": "the hub's client is slow to import and needed for hub ids only",
    "kernels.select:select_kernels": "the native kernels are built only where they are wanted",
    "kernels.select:_triton": "Triton is installed only where there is an accelerator",
    "kernels.triton.kernels:_hopper_launcher": "Gluon is slow to import and needed on one kind of chip only",
    "kernels.triton.kernels:_hopper_products": "Gluon is slow to import and needed on one kind of chip only",
    "platforms.cuda:open_cuda": "the vendor's libraries are installed only where there is such a device",
    "platforms.rocm:open_rocm": "the vendor's library is installed only where there is such a device",
    "platforms.detect:_cuda": "torch and the vendor's libraries are loaded only where the device is asked for",
    "platforms.detect:_rocm": "torch and the vendor's libraries are loaded only where the device is asked for",
    "platforms.detect:_xpu": "torch and the vendor's libraries are loaded only where the device is asked for",
    "platforms.base:Platform.torch_device": "a platform is asked for figures where torch is not loaded",
    "platforms.base:Platform.memory_view": "a platform is asked for figures where torch is not loaded",
    "platforms.base:Platform.as_brim_error": "a platform is asked for figures where torch is not loaded",
}
TORCH_FREE_PACKAGES = ("errors", "units", "config", "text", "engine", "cli")
TORCH_FREE_EXCEPTIONS = frozenset({"cli.bench_limits"})


def ours(entry: Import) -> str | None:
    """The top package an import reaches inside brim; None for other libraries."""
    if entry.target == "brim":
        return "brim"
    return entry.target.split(".")[1] if entry.target.startswith("brim.") else None


def test_every_package_has_its_place() -> None:
    assert {module.package for module in modules()} <= set(MAY_IMPORT)


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.name)
def test_imports_go_one_way(module: Module) -> None:
    allowed = {module.package, *MAY_IMPORT.get(module.package, ())}
    wrong = [
        f"{where(module, entry.line)} imports {entry.target}"
        for entry in imports_of(module)
        if ours(entry) is not None and not entry.only_types and ours(entry) not in allowed
    ]
    assert not wrong


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.name)
def test_imports_stand_at_the_top(module: Module) -> None:
    if module.package == "cli":
        return
    wrong = [
        f"{where(module, entry.line)} imports {entry.target} in {entry.function}"
        for entry in imports_of(module)
        if entry.function and f"{module.name}:{entry.function}" not in FACTORIES
    ]
    assert not wrong


def test_the_list_of_factories_is_no_longer_than_needed() -> None:
    used = {f"{module.name}:{entry.function}" for module in modules() for entry in imports_of(module) if entry.function}
    assert used >= set(FACTORIES)


def test_nothing_imports_transformers() -> None:
    wrong = [
        f"{where(module, entry.line)} imports {entry.target}"
        for module in modules()
        for entry in imports_of(module)
        if entry.target.split(".")[0] == "transformers"
    ]
    assert not wrong


@pytest.mark.parametrize("package", TORCH_FREE_PACKAGES)
def test_torch_free_packages_import_no_torch_not_even_through_others(package: str) -> None:
    names = [m.name for m in modules() if m.package == package and m.name not in TORCH_FREE_EXCEPTIONS]
    code = f"import sys, {', '.join(f'brim.{name}' for name in names)}\nassert 'torch' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_worker_is_the_engines_executor() -> None:
    bases = {
        base.split(".")[-1]
        for module in modules()
        if module.package == "worker"
        for node in module.tree.body
        if hasattr(node, "bases")
        for base in map(_name, node.bases)
    }
    assert "Executor" in bases


def _name(node: object) -> str:
    return str(getattr(node, "id", getattr(node, "attr", "")))
