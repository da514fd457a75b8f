"""Buffers that share bytes by the plan give the results of buffers that share none, and how many bytes that saves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from brim.kernels.base import Activation, Kernels
from brim.memory.workspace import plan_workspace
from brim.models.base import Model
from brim.models.decoder import decoder_buffer_shapes

from .conftest import Saved
from .helpers import MAX_TOKENS, PagedRun, load_folder, prompt_ids, spec_of


def planned_buffers(model: Model) -> dict[str, Tensor]:
    """Views of one range of NaN, laid out as the worker's."""
    shapes = list(model.buffer_shapes())
    plan = plan_workspace([shape.spec(MAX_TOKENS) for shape in shapes])
    memory = torch.full((plan.num_bytes // 4,), float("nan")).view(torch.uint8)
    views = {}
    for shape in shapes:
        spec = shape.spec(MAX_TOKENS)
        first = plan.offsets_bytes[shape.name]
        views[shape.name] = memory[first : first + spec.num_bytes].view(shape.dtype).view(MAX_TOKENS, shape.width)
    return views


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3-tied-bias", "gemma3"])
def test_sharing_bytes_changes_nothing(name: str, saved: Saved, kernels: Kernels) -> None:
    model = load_folder(saved(name, torch.float32)[1], kernels)
    ids, chunks = prompt_ids(24), [16, 1, 7]
    alone = PagedRun(model).logits(ids, chunks)
    run = PagedRun(model)
    run.use_buffers(planned_buffers(model))
    assert torch.equal(run.logits(ids, chunks), alone)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_bytes_are_those_of_the_widest_stage(name: str, saved: Saved) -> None:
    """Either qkv and what attention makes of it, or gate and up.

    Worked example (llama): 64 tokens * 4 bytes * (128 residual + 128 hidden + 2 * 208 gate and up) = 172,032.
    """
    spec = spec_of(saved(name, torch.float32)[1])
    plan = plan_workspace([shape.spec(MAX_TOKENS) for shape in decoder_buffer_shapes(spec, torch.float32)])
    attention = 2 * (spec.num_heads + spec.num_kv_heads) * spec.head_dim
    assert plan.num_bytes == MAX_TOKENS * 4 * (2 * spec.hidden_size + max(attention, 2 * spec.intermediate_size))
    if name == "llama":
        assert plan.num_bytes == 172_032


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [208, 37])
def test_the_activation_may_be_written_over_its_gate(
    width: int, dtype: torch.dtype, activation: Activation, kernels: Kernels
) -> None:
    """What the decoder relies on; the half that holds `up` is left as it was."""
    gate_up = torch.randn(9, 2 * width, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = torch.empty(9, width, dtype=dtype)
    kernels.gated_activation(gate_up, expected, activation)
    inside = gate_up.clone()
    kernels.gated_activation(inside, inside[:, :width], activation)
    assert torch.equal(inside[:, :width], expected) and torch.equal(inside[:, width:], gate_up[:, width:])
