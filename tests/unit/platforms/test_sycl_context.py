"""The helper that finds the native context: compiled by a stand-in for the C++ compiler, called for real."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from brim.platforms.sycl_context import SOURCE, NoContext, native_context

HELPER = "unsigned long long brim_native_context(void *queue) { return queue ? (unsigned long long)queue + 1 : 0; }"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root where the SYCL runtime is loaded, its headers, and a "C++ compiler" that compiles HELPER and notes its arguments."""
    maps = tmp_path / "proc/self/maps"
    maps.parent.mkdir(parents=True)
    maps.write_text(f"7f0000000000-7f0000001000 r-xp 00000000 00:00 0  {tmp_path}/libsycl.so.9\n")
    headers = tmp_path / "oneapi/include/sycl"
    headers.mkdir(parents=True)
    (headers / "sycl.hpp").touch()
    (tmp_path / "helper.c").write_text(HELPER)
    compiler = tmp_path / "cxx"
    compiler.write_text(
        f"""#!/bin/sh
echo "$@" >> {tmp_path}/arguments
while [ "$1" != -o ]; do shift; done
exec {shutil.which("cc")} -shared -fPIC -o "$2" {tmp_path}/helper.c
"""
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("CMPLR_ROOT", str(tmp_path / "oneapi"))
    return tmp_path


def test_the_helper_is_compiled_once_and_asked(machine: Path) -> None:
    assert native_context(0x7000, machine, machine / "cache") == 0x7001
    assert native_context(0x8000, machine, machine / "cache") == 0x8001
    (arguments,) = (machine / "arguments").read_text().splitlines()
    assert f"-I{machine}/oneapi/include" in arguments and str(SOURCE) in arguments
    assert arguments.endswith(f"{machine}/libsycl.so.9"), "the runtime that torch has loaded, no other"


def test_a_queue_without_such_a_context(machine: Path) -> None:
    with pytest.raises(NoContext, match="names none"):
        native_context(0, machine, machine / "cache")


@pytest.mark.parametrize(
    ("remove", "said"),
    [("proc/self/maps", "SYCL runtime in this process"), ("oneapi/include/sycl/sycl.hpp", "headers"), ("helper.c", "cxx failed")],
)
def test_what_is_missing_is_said(machine: Path, remove: str, said: str) -> None:
    (machine / remove).unlink()
    with pytest.raises(NoContext, match=said):
        native_context(0x7000, machine, machine / "cache")


def test_without_a_compiler(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(machine / "nothing"))
    with pytest.raises(NoContext, match=r"not found: a C\+\+ compiler"):
        native_context(0x7000, machine, machine / "cache")
