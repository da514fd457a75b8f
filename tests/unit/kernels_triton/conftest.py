"""Triton kernels without a GPU run in its interpreter, which tests/conftest.py chose; with a GPU they run there."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from triton.runtime import interpreter


def _loop_over_device_values() -> None:
    """Let loops run to a bound read on the device: triton 3.6 turns it into an int in a way that numpy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def patch_and_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_index


if os.environ.get("TRITON_INTERPRET") == "1":
    _loop_over_device_values()


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
