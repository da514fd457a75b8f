"""Both CPU backends, and saved random models made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from brim.kernels.base import Kernels
from brim.kernels.select import select_kernels
from brim.kernels.torch_ref import TorchKernels

from .helpers import CONFIGS, random_model


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small only wait for each other on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


Saved = Callable[[str, torch.dtype], tuple[PreTrainedModel, Path]]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """name, dtype -> the `transformers` model of CONFIGS and the folder it was saved to."""
    made: dict[tuple[str, torch.dtype], tuple[PreTrainedModel, Path]] = {}

    def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Path]:
        if (name, dtype) not in made:
            model = random_model(CONFIGS[name](), dtype)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name, dtype] = model, folder
        return made[name, dtype]

    return make
