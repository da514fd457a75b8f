"""The kernels under test: the reference, the native build for this machine, and the native portable paths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from brim.kernels.cpu.build import build
from brim.kernels.cpu.kernels import CpuKernels
from brim.kernels.torch_ref import TorchKernels

PORTABLE_FLAGS = {"native": None, "avx2": ["-march=x86-64-v3"], "plain": []}


def library(variant: str) -> Path:
    if variant == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs AVX2")
    result = build(machine_flags=PORTABLE_FLAGS[variant])
    if result.path is None:
        pytest.skip(str(result.reason))
    return result.path


@pytest.fixture(scope="session")
def reference() -> TorchKernels:
    return TorchKernels("cpu")


@pytest.fixture(scope="session", params=["native", "avx2", "plain"])
def kernels(request: pytest.FixtureRequest) -> Iterator[CpuKernels]:
    """Each native variant, on two threads."""
    made = CpuKernels(library(request.param), num_threads=2)
    yield made
    made.close()


@pytest.fixture(scope="session", params=[1, 2, 3])
def threaded(request: pytest.FixtureRequest) -> Iterator[CpuKernels]:
    """The native build on one, two and three threads."""
    made = CpuKernels(library("native"), num_threads=request.param)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
