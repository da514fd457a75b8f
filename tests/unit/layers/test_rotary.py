"""Rotary tables against the rotary modules of `transformers`, and a worked example."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from brim.config.model_spec import RopeSpec
from brim.layers.rotary import cos_sin_table, inverse_frequencies

POSITIONS = 5000  # more than one chunk of the table's filling
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def llama_config(head_dim: int, **rope: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=8192, rope_parameters=rope
    )


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize(
    ("rope", "theirs"),
    [
        (RopeSpec(theta=1e4), {"rope_type": "default", "rope_theta": 1e4}),
        (RopeSpec(theta=1e6, scaling="linear", factor=8.0), {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}),
        (
            RopeSpec(theta=5e5, scaling="llama3", original_max_position=1024, **LLAMA3),
            {"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 1024, **LLAMA3},
        ),
    ],
    ids=["default", "linear", "llama3"],
)
def test_tables_are_those_of_transformers(head_dim: int, rope: RopeSpec, theirs: dict[str, Any]) -> None:
    module = LlamaRotaryEmbedding(llama_config(head_dim, **theirs))
    assert torch.equal(inverse_frequencies(rope, head_dim), module.inv_freq)
    cos, sin = module(torch.zeros(1), torch.arange(POSITIONS)[None])
    table = cos_sin_table(rope, head_dim, POSITIONS)
    half = head_dim // 2
    assert torch.allclose(table[:, :half], cos[0, :, :half], rtol=0, atol=1e-6)
    assert torch.allclose(table[:, half:], sin[0, :, :half], rtol=0, atol=1e-6)


def test_gemma3_has_two_tables() -> None:
    module = Gemma3RotaryEmbedding(Gemma3TextConfig(head_dim=64, max_position_embeddings=8192))
    for kind, theta in (("full_attention", 1e6), ("sliding_attention", 1e4)):
        cos, _ = module(torch.zeros(1), torch.arange(POSITIONS)[None], kind)
        table = cos_sin_table(RopeSpec(theta=theta), 64, POSITIONS)
        assert torch.allclose(table[:, :32], cos[0, :, :32], rtol=0, atol=1e-6)


def test_worked_example() -> None:
    """head_dim 4, theta 100: frequencies 1 and 100 ** -0.5 = 0.1."""
    table = cos_sin_table(RopeSpec(theta=100.0), 4, 3)
    assert table.shape == (3, 4)
    expected = torch.tensor([2.0, 0.2])
    assert torch.allclose(table[2], torch.cat([expected.cos(), expected.sin()]))
    assert torch.allclose(inverse_frequencies(RopeSpec(theta=100.0, scaling="linear", factor=2.0), 4), torch.tensor([0.5, 0.05]))


def test_divisors_are_llama3_scaling_worked_out() -> None:
    """What a converter stores in `rope_freqs.weight`: the plain frequency over the scaled one."""
    plain = inverse_frequencies(RopeSpec(theta=5e5), 64)
    scaled = inverse_frequencies(RopeSpec(theta=5e5, scaling="llama3", original_max_position=1024, **LLAMA3), 64)
    divisors = tuple((plain / scaled).tolist())
    assert min(divisors) == 1.0 and max(divisors) == pytest.approx(8.0)
    assert torch.allclose(inverse_frequencies(RopeSpec(theta=5e5, divisors=divisors), 64), scaled, rtol=1e-6, atol=0)
