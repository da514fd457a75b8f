"""Steps of one token or few whose products take in norms, activation and sums give what separate calls give; larger ones are as
ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.kernels_triton.gluon_model import Machine
from tests.unit.models.helpers import CONFIGS, PagedRun, load_folder, prompt_ids, random_model, spec_of

from brim.config.model_spec import ModelSpec, spec_from_hf_config
from brim.kernels.torch_ref import TorchKernels
from brim.kernels.triton import hopper_product
from brim.kernels.triton.chip import Chip
from brim.kernels.triton.choice import CHOSEN, KernelChoice
from brim.kernels.triton.kernels import TritonKernels
from brim.kernels.triton.launch import launch_now
from brim.kernels.triton.scratch import KernelLimits
from brim.kernels.triton.tuning import FEW_ROWS


@contextmanager
def counted(machine: Machine | None = None) -> Iterator[tuple[list[str], Any]]:
    """Names of the kernels that were launched, and the launch to give to kernels. machine: for the one that it models."""
    names: list[str] = []

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__)
        start = machine.launch if machine is not None and names[-1] == "hopper_product_kernel" else launch_now
        start(kernel, grid, *arguments, **options)

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


class HalfKernels(TritonKernels):
    """In float16 what is done in bfloat16 elsewhere: the interpreter multiplies no bfloat16."""

    def fused_rows(self, spec: ModelSpec, dtype: torch.dtype) -> int:
        assert dtype == torch.float16
        assert super().fused_rows(spec, dtype) <= 1
        return super().fused_rows(spec, torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="these kernels run on the CPU, in the interpreter")
@pytest.mark.parametrize(("name", "fuses"), [("llama", True), ("qwen3", True), ("gemma3", False)])
def test_few_rows_with_norms_cut_in_two(name: str, fuses: bool, tmp_path: Path) -> None:
    """Steps of 20, 9, 4 and 1 tokens; the product for Hopper runs on a model of the chip."""
    random_model(CONFIGS[name](), torch.float16).save_pretrained(tmp_path)
    spec = spec_of(tmp_path)
    limits = KernelLimits(2, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size)
    chip, choice = Chip(2, wide_products=False, hopper=True), KernelChoice(fused_row=True, hopper=True, split_norm=True)
    machine = Machine(Path(hopper_product.__file__))
    with counted(machine) as (names, launch):
        kernels = HalfKernels("cpu", limits, chip, launch, choice)
        ids, chunks = prompt_ids(34), [20, 9, 4, 1]
        found = PagedRun(load_folder(tmp_path, kernels, torch.float16)).logits(ids, chunks)
    expected = PagedRun(load_folder(tmp_path, TorchKernels("cpu"))).logits(ids, chunks)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.02)
    assert names.count("add_rms_norm_kernel") == (1 if fuses else 4) * 2 * spec.num_layers
    assert names.count("rms_norm_kernel") == (6 if fuses else 4)  # the first and the last one of a step stay
    assert "hopper_product_kernel" in names


@pytest.mark.parametrize(
    ("changed", "dtype", "is_hopper", "rows"),
    [
        ({}, torch.bfloat16, True, FEW_ROWS), ({"hidden_size": 2048}, torch.bfloat16, True, FEW_ROWS),
        ({}, torch.float16, True, 1), ({}, torch.bfloat16, False, 1), ({"hidden_size": 4096}, torch.bfloat16, True, 1),
        ({"intermediate_size": 3076}, torch.bfloat16, True, 1),
    ],
    ids=str,
)  # fmt: skip
def test_which_steps_are_fused(changed: dict[str, int], dtype: torch.dtype, is_hopper: bool, rows: int) -> None:
    """float16 could not hold what is not divided yet; the kernel takes narrow results in rows that copies reach."""
    spec = spec_from_hf_config(
        {"model_type": "qwen3", "vocab_size": 100, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 1,
         "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 64, **changed}
    )  # fmt: skip
    limits, chip = KernelLimits.of(spec, 4), Chip(132, True, True, hopper=is_hopper)
    splits = replace(CHOSEN, fused_row=True, split_norm=True)
    for choice, expected in ((splits, rows), (replace(splits, split_norm=False), 1), (replace(splits, fused_row=False), 0)):
        assert TritonKernels("meta", limits, chip, choice=choice).fused_rows(spec, dtype) == expected
