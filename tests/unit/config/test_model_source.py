"""What stands beside the weights: odd JSON is the model's fault and said so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from brim.config.model_source import open_model
from brim.config.schema import ModelConfig
from brim.errors import BrokenModel, UnsupportedModel

_CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "vocab_size": 256,
    "eos_token_id": 1,
}


def _folder(tmp_path: Path, **files: str) -> ModelConfig:
    for name, text in {"config": json.dumps(_CONFIG), **files}.items():
        (tmp_path / f"{name}.json").write_text(text)
    return ModelConfig(model=str(tmp_path), load_format="dummy")


@pytest.mark.parametrize("value", ['"x"', "[null]", "[[1]]", "1.5", "true", "{}"])
def test_a_generation_config_with_odd_ids_is_named(tmp_path: Path, value: str) -> None:
    model = _folder(tmp_path, generation_config=f'{{"eos_token_id": {value}}}')
    with pytest.raises(BrokenModel, match=r"generation_config\.json.*eos_token_id"):
        open_model(model)


def test_the_ids_of_both_files_are_taken_once_each(tmp_path: Path) -> None:
    assert open_model(_folder(tmp_path, generation_config='{"eos_token_id": [2, 1]}')).eos_token_ids == (1, 2)


@pytest.mark.parametrize("name", ["config", "generation_config"])
@pytest.mark.parametrize("text", ["[" * 200_000, "{", "[1]", ""])
def test_json_that_cannot_be_read_is_named(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(BrokenModel, match=rf"{name}\.json"):
        open_model(_folder(tmp_path, **{name: text}))


def test_an_architecture_that_is_not_there_is_named_before_its_weights_are_missed(tmp_path: Path) -> None:
    _folder(tmp_path, config='{"model_type": "qwen3_moe"}')
    with pytest.raises(UnsupportedModel, match="qwen3_moe"):
        open_model(ModelConfig(model=str(tmp_path)))
