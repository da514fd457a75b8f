"""Steps of one token whose products take in norms, activation and sums give what separate calls give; larger ones are as ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.models.helpers import CONFIGS, PagedRun, load_folder, prompt_ids, random_model, spec_of

from brim.kernels.torch_ref import TorchKernels
from brim.kernels.triton.choice import KernelChoice
from brim.kernels.triton.kernels import TritonKernels
from brim.kernels.triton.launch import launch_now
from brim.kernels.triton.scratch import KernelLimits


@contextmanager
def counted() -> Iterator[tuple[list[str], Any]]:
    """Names of the kernels that were launched, and the launch to give to kernels."""
    names: list[str] = []

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__)
        launch_now(kernel, grid, *arguments, **options)

    yield names, launch


@pytest.mark.skipif(torch.cuda.is_available(), reason="these kernels run on the CPU, in the interpreter")
@pytest.mark.parametrize(("name", "fuses"), [("llama", True), ("qwen3", True), ("gemma3", False), ("qwen2", False)])
def test_fused_steps(name: str, fuses: bool, tmp_path: Path) -> None:
    random_model(CONFIGS[name](), torch.float32).save_pretrained(tmp_path)
    spec = spec_of(tmp_path)
    limits = KernelLimits(2, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size)
    with counted() as (names, launch):
        kernels = TritonKernels("cpu", limits, launch=launch, choice=KernelChoice(fused_row=True))
        ids, chunks = prompt_ids(14), [9, 4, 1]
        found = PagedRun(load_folder(tmp_path, kernels)).logits(ids, chunks)
    expected = PagedRun(load_folder(tmp_path, TorchKernels("cpu"))).logits(ids, chunks)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    steps_with_norms = 2 if fuses else 3
    assert names.count("add_rms_norm_kernel") == steps_with_norms * 2 * spec.num_layers
    assert "vector_product_kernel" in names
