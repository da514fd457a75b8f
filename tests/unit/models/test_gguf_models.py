"""GGUF files of random models, written as llama.cpp's converter writes them, give the logits of the model they came from."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from transformers import LlamaConfig

from brim.config.model_source import open_model
from brim.config.schema import ModelConfig
from brim.errors import BrokenModel, UnsupportedModel
from brim.formats.gguf import GGUFFile
from brim.kernels.base import Kernels
from brim.layers.rotary import inverse_frequencies
from brim.models.decoder import DecoderModel
from brim.models.loader import load_weights

from .gguf_writer import rounded, write_gguf
from .helpers import COMMON, CONFIGS, LLAMA3_ROPE, MAX_LEN, PagedRun, hf_logits, prompt_ids, random_model, spec_of

Kind = gguf.GGMLQuantizationType
MOST_DIFFERENCE = 2e-5
# rows of whole Q8_0 blocks
WIDE = {**COMMON, "intermediate_size": 224}


def load_gguf(path: Path, kernels: Kernels, dtype: torch.dtype = torch.float32) -> DecoderModel:
    source = open_model(ModelConfig(model=str(path)))
    try:
        assert source.weights is not None
        model = DecoderModel(source.spec, kernels, dtype, MAX_LEN, torch.device("cpu"))
        load_weights(model, source.weights, kernels, lambda *_: None)
        return model
    finally:
        source.close()


def differ(path: Path, oracle: torch.nn.Module, kernels: Kernels) -> float:
    ids = prompt_ids()
    ours = PagedRun(load_gguf(path, kernels)).logits(ids, [60])
    return (ours - hf_logits(oracle, ids)).abs().max().item()


CASES = [(name, kind) for name in ("llama", "gemma3") for kind in (Kind.F32, Kind.F16, Kind.BF16)]
CASES += [(name, Kind.Q8_0) for name in ("llama", "llama-head-80", "qwen2", "qwen3", "qwen3-tied", "gemma3")]


@pytest.mark.parametrize(("name", "kind"), CASES, ids=[f"{name}-{kind.name}" for name, kind in CASES])
def test_round_trip(name: str, kind: Kind, kernels: Kernels, tmp_path: Path) -> None:
    config = CONFIGS[name.removesuffix("-tied")]()
    config.intermediate_size = WIDE["intermediate_size"]
    config.tie_word_embeddings = name in ("qwen3-tied", "gemma3")
    oracle = random_model(config)
    path = write_gguf(oracle, tmp_path / "model.gguf", kind)
    rounded(oracle, kind)
    assert differ(path, oracle, kernels) <= MOST_DIFFERENCE


def test_llama_biases_are_permuted_too(kernels: Kernels, tmp_path: Path) -> None:
    oracle = random_model(LlamaConfig(**COMMON, attention_bias=True))
    path = write_gguf(oracle, tmp_path / "model.gguf", Kind.F32)
    assert differ(path, oracle, kernels) <= MOST_DIFFERENCE


def test_llama3_rope_scaling_is_read_from_its_tensor(kernels: Kernels, tmp_path: Path) -> None:
    """Converters do not write llama3's scaling as keys: `rope_freqs.weight` divides the frequencies."""
    oracle = random_model(LlamaConfig(**COMMON, rope_parameters=LLAMA3_ROPE))
    oracle.save_pretrained(tmp_path)
    scaled = spec_of(tmp_path).rope_full
    plain = inverse_frequencies(type(scaled)(theta=scaled.theta), 32)
    divisors = (plain / inverse_frequencies(scaled, 32)).numpy()
    path = write_gguf(oracle, tmp_path / "model.gguf", Kind.F32, rope_freqs__weight=divisors)
    assert differ(path, oracle, kernels) <= MOST_DIFFERENCE


def test_rope_divisors_stored_otherwise_are_refused(tmp_path: Path) -> None:
    oracle = random_model(CONFIGS["llama"]())
    path = write_gguf(oracle, tmp_path / "model.gguf", Kind.F32, rope_freqs__weight=torch.ones(16).half().numpy())
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight"):
        open_model(ModelConfig(model=str(path)))


def test_missing_and_unknown_tensors_are_named(kernels: Kernels, tmp_path: Path) -> None:
    oracle = random_model(CONFIGS["qwen2"]())
    path = write_gguf(oracle, tmp_path / "missing.gguf", Kind.F32, skip="blk.1.ffn_up.weight")
    with pytest.raises(BrokenModel, match=r"layers\.1\.up"):
        load_gguf(path, kernels)
    path = write_gguf(oracle, tmp_path / "more.gguf", Kind.F32, blk__0__extra__weight=torch.ones(4).numpy())
    with pytest.raises(BrokenModel, match=r"blk\.0\.extra\.weight"):
        load_gguf(path, kernels)


def test_the_writer_writes_what_it_says(tmp_path: Path) -> None:
    oracle = random_model(CONFIGS["llama"]())
    file = GGUFFile.open(write_gguf(oracle, tmp_path / "model.gguf", Kind.F16))
    assert (
        file.info("blk.0.attn_q.weight").ggml_type.name == "F16" and file.info("blk.0.attn_norm.weight").ggml_type.name == "F32"
    )
    file.close()
