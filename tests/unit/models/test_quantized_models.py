"""Models whose matrices stay as their file quantised them: right values in right places, exact bytes, one result a token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import torch

from brim.config.model_source import ModelSource, open_model
from brim.config.schema import ModelConfig
from brim.errors import ConfigError
from brim.formats.ggml_type import GGMLType
from brim.kernels.base import Kernels
from brim.kernels.cpu.kernels import CpuKernels
from brim.kernels.planned import planned_kernels
from brim.kernels.select import select_kernels
from brim.kernels.torch_ref import TorchKernels
from brim.kernels.triton.scratch import KernelLimits
from brim.layers.weights import NO_BLOCKS, KeptBlocks, weights_num_bytes
from brim.models.decoder import DecoderModel
from brim.models.loader import load_weights
from brim.worker.weight_choice import WeightChoice, choose_weights

from .gguf_writer import write_gguf
from .helpers import CONFIGS, MAX_LEN, PagedRun, chunkings, prompt_ids, random_model

Kind = gguf.GGMLQuantizationType
NATIVE = planned_kernels("native", KernelLimits(1, 4, 2, 16, 64), 1)


def written(name: str, kind: Kind, path: Path, *, tied: bool = False) -> Path:
    config = CONFIGS[name]()
    config.intermediate_size = 224  # rows of whole blocks
    config.tie_word_embeddings = tied or name == "gemma3"
    return write_gguf(random_model(config), path / "model.gguf", kind)


def opened(path: Path) -> ModelSource:
    return open_model(ModelConfig(model=str(path)))


def loaded(path: Path, kernels: Kernels, dtype: torch.dtype, kept: KeptBlocks | None = None) -> DecoderModel:
    """kept None: all that the kernels can keep."""
    source = opened(path)
    try:
        if kept is None:
            kept = choose_weights(ModelConfig(model=str(path)), kernels, source).kept
        assert source.weights is not None
        model = DecoderModel(source.spec, kernels, dtype, MAX_LEN, torch.device("cpu"), kept)
        load_weights(model, source.weights, kernels, lambda *_: None)
        return model
    finally:
        source.close()


@pytest.fixture(scope="module")
def native() -> Iterator[CpuKernels]:
    """The backend that keeps blocks."""
    kernels = select_kernels("cpu", num_threads=2).kernels
    assert isinstance(kernels, CpuKernels)
    yield kernels
    kernels.close()


CASES = [(name, Kind.Q8_0) for name in ("llama", "llama-head-80", "qwen2", "qwen3", "gemma3")]
CASES += [("llama", kind) for kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1)]


@pytest.mark.parametrize(("name", "kind"), CASES, ids=[f"{name}-{kind.name}" for name, kind in CASES])
def test_matrices_hold_what_dequantising_gives(name: str, kind: Kind, native: CpuKernels, tmp_path: Path) -> None:
    """Bit for bit and in the right rows (heads that the file permutes included); logits follow within the rows' rounding."""
    path = written(name, kind, tmp_path)
    plain, kept = loaded(path, native, torch.float32, NO_BLOCKS), loaded(path, native, torch.float32)
    for ours, theirs in zip(kept.weights.layers, plain.weights.layers, strict=True):
        for part in ("qkv", "output", "gate_up", "down"):
            assert getattr(ours, part).block_type_of(0) == kind
            assert torch.equal(getattr(ours, part).to_dense(), getattr(theirs, part).to_dense())
    assert torch.equal(kept.weights.embedding.to_dense(), plain.weights.embedding.to_dense())
    ids = prompt_ids()
    ours, theirs = PagedRun(kept).logits(ids, [60]), PagedRun(plain).logits(ids, [60])
    assert 0 < (ours - theirs).square().mean().sqrt() <= 0.03 * theirs.square().mean().sqrt()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_every_chunking_gives_the_same_bits(name: str, native: CpuKernels, tmp_path: Path) -> None:
    model = loaded(written(name, Kind.Q5_0, tmp_path), native, torch.bfloat16)
    ids = prompt_ids()
    found = {label: PagedRun(model).logits(ids, chunks) for label, chunks in chunkings(len(ids)).items()}
    assert all(torch.equal(logits, found["whole"]) for logits in found.values())


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_are_known_before(tied: bool, native: CpuKernels, tmp_path: Path) -> None:
    """To kernels that are there and to a plan alike; beyond the file's there is only the padding of the last rows."""
    path = written("qwen3", Kind.Q4_0, tmp_path, tied=tied)
    model = loaded(path, native, torch.bfloat16)
    weights, source = model.weights, opened(path)
    kept = choose_weights(ModelConfig(model=str(path)), native, source).kept
    matrices = {id(w): w.num_bytes for w in (weights.embedding, weights.lm_head)}
    in_file = sum(info.num_bytes for info in source.weights.tensors.values() if len(info.shape) == 2)  # type: ignore[union-attr]
    for layer in weights.layers:
        matrices |= {id(w): w.num_bytes for w in (layer.qkv, layer.output, layer.gate_up, layer.down)}
    source.close()
    vectors = weights_num_bytes(model.spec, TorchKernels("cpu"), torch.bfloat16) - 2 * (
        model.spec.num_parameters - _vector_elements(model)
    )
    assert model.weight_bytes == sum(matrices.values()) + vectors
    assert weights_num_bytes(model.spec, NATIVE, torch.bfloat16, kept) == model.weight_bytes
    assert 0 <= sum(matrices.values()) - in_file < 16 * 2 * model.spec.hidden_size, "no more than the last rows' padding"


def _vector_elements(model: DecoderModel) -> int:
    layers = [getattr(layer, name) for layer in model.weights.layers for name in layer.__dataclass_fields__]
    return sum(part.numel() for part in [model.weights.final_norm, *layers] if isinstance(part, torch.Tensor))


def choice(path: Path, kernels: Kernels, **settings: str) -> WeightChoice:
    source = opened(path)
    try:
        return choose_weights(ModelConfig(model=str(path), **settings), kernels, source)  # type: ignore[arg-type]
    finally:
        source.close()


def test_what_is_kept_and_why(native: CpuKernels, tmp_path: Path) -> None:
    path = written("llama", Kind.Q8_0, tmp_path)
    kept = choice(path, native)
    assert kept.text == "as stored: Q8_0" and set(kept.kept.values()) == {GGMLType.Q8_0}
    assert choice(path, native, dtype="float32", quantization="gguf") == kept
    for settings in ({"dtype": "bfloat16"}, {"quantization": "none"}):
        without = choice(path, native, **settings)
        assert not without.kept and "--" in without.text
    reference = TorchKernels("cpu")
    assert not choice(path, reference).kept and "multiply no Q8_0" in choice(path, reference).text
    with pytest.raises(ConfigError, match="multiply no Q8_0"):
        choice(path, reference, quantization="gguf")


def test_a_file_that_is_not_quantised(native: CpuKernels, tmp_path: Path) -> None:
    path = written("llama", Kind.BF16, tmp_path)
    assert not choice(path, native).kept and "not quantised" in choice(path, native).text
    with pytest.raises(ConfigError, match="not quantised"):
        choice(path, native, quantization="gguf")
