"""The demo model's numbers, without its files."""

import pytest

from brim.config.model_spec import ModelSpec, spec_from_hf_config

DEMO_CONFIG = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
}

DEMO_SPEC = spec_from_hf_config(DEMO_CONFIG)


@pytest.fixture
def demo_spec() -> ModelSpec:
    """Gemma 3 270M: 3 full layers, 15 sliding."""
    return DEMO_SPEC
