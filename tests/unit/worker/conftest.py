"""The kernels a sampler or runner is tested with, and the rows of its forward passes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import Tensor

from brim.kernels.base import Kernels
from brim.kernels.select import select_kernels
from brim.kernels.torch_ref import TorchKernels
from brim.models.base import Model, StepTensors


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


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of every forward pass: tokens, and rows whose hidden states were asked for."""
    noted: list[tuple[int, int]] = []
    plain = Model.forward

    def forward(self: Model, step: StepTensors) -> Tensor:
        noted.append((len(step.ids), step.num_wanted))
        return plain(self, step)

    monkeypatch.setattr(Model, "forward", forward)
    return noted
