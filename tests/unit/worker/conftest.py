"""The kernels a sampler or runner is tested with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from brim.kernels.base import Kernels
from brim.kernels.select import select_kernels
from brim.kernels.torch_ref import TorchKernels


@pytest.fixture(scope="session", params=["torch", "native"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """The reference and the native kernels."""
    if request.param == "torch":
        yield TorchKernels("cpu")
        return
    selection = select_kernels("cpu", num_threads=2)
    if selection.fallback_reason is not None:
        pytest.skip(selection.fallback_reason)
    yield selection.kernels
    selection.kernels.close()
