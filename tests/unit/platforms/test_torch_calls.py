"""What the platforms call of torch is there, by name, in the torch that is installed: stand-ins cannot tell."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import brim.platforms
from brim.platforms.torch_platform import TorchPlatform
from brim.platforms.xpu import XpuPlatform

FOLDER = Path(brim.platforms.__file__).parent
CALL = re.compile(r"self\._runtime\.(\w+)")


@pytest.mark.parametrize(
    ("files", "module"),
    [(("torch_platform", "cuda"), torch.cuda), (("torch_platform", "rocm"), torch.cuda), (("torch_platform", "xpu"), torch.xpu)],
)
def test_torch_has_what_is_called(files: tuple[str, ...], module: ModuleType) -> None:
    called = {name for file in files for name in CALL.findall((FOLDER / f"{file}.py").read_text(encoding="utf-8"))}
    called -= {"CUDAGraph"} if module is torch.xpu else set()  # what a graph is there, that platform says itself
    assert len(called) > 12 and {name for name in called if not hasattr(module, name)} == set()


@pytest.mark.parametrize(("platform", "module"), [(TorchPlatform, torch.cuda), (XpuPlatform, torch.xpu)])
def test_torch_has_the_private_calls_that_end_a_pool(platform: type[TorchPlatform], module: ModuleType) -> None:
    assert all(hasattr(module.memory, name) or hasattr(torch._C, name) for name in platform.pool_calls)
