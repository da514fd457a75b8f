"""Loading: shards, tied weights, what is wrong with files named, dummy weights, and how much memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from brim.config.model_source import open_model
from brim.config.schema import ModelConfig
from brim.errors import BrokenModel, ModelError, UnsupportedModel
from brim.kernels.base import Kernels
from brim.kernels.torch_ref import TorchKernels
from brim.layers.weights import weights_num_bytes
from brim.models.decoder import DecoderModel
from brim.models.loader import CHUNK_BYTES, fill_dummy

from .conftest import Saved
from .helpers import MAX_LEN, PagedRun, hf_logits, load_folder, prompt_ids, spec_of

MIB = 1 << 20


@pytest.mark.parametrize("has_index", [True, False])
def test_shards(has_index: bool, saved: Saved, kernels: Kernels, tmp_path: Path) -> None:
    oracle, _ = saved("llama", torch.float32)
    oracle.save_pretrained(tmp_path, max_shard_size="300KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    if not has_index:
        (tmp_path / "model.safetensors.index.json").unlink()
    ids = prompt_ids(20)
    result = PagedRun(load_folder(tmp_path, kernels)).logits(ids, [20])
    assert (result - hf_logits(oracle, ids)).abs().max() < 2e-5


def test_tied_embeddings_may_be_stored_twice(saved: Saved, kernels: Kernels, tmp_path: Path) -> None:
    """Some exporters write lm_head although it is the embedding: it is left aside, and not held twice."""
    oracle, _ = saved("qwen3-tied-bias", torch.float32)
    oracle.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    model = load_folder(tmp_path, kernels)
    assert model.weights.lm_head is model.weights.embedding
    ids = prompt_ids(20)
    assert (PagedRun(model).logits(ids, [20]) - hf_logits(oracle, ids)).abs().max() < 2e-5


def edit(tensors: dict[str, Tensor], name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {**tensors, name: change(tensors[name]).contiguous()}


UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        (lambda t: {k: v for k, v in t.items() if k != UP}, BrokenModel, r"layers\.1\.up"),
        (lambda t: {k: v for k, v in t.items() if "layers.2" not in k}, BrokenModel, r"layers\.2\..* and 6 more"),
        (lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"}, BrokenModel, "lm_head"),
        (lambda t: edit(t, UP, lambda w: w[:-1]), BrokenModel, rf"{UP}.*\[207, 128\].*\[208, 128\]"),
        (lambda t: edit(t, UP, lambda w: w.T), BrokenModel, UP),
        (lambda t: edit(t, UP, lambda w: w.flatten()), BrokenModel, UP),
        (lambda t: edit(t, NORM, lambda w: w[None]), BrokenModel, NORM),
        (lambda t: edit(t, UP, lambda w: w.to(torch.int8)), UnsupportedModel, rf"{UP}.*I8"),
        (lambda t: edit(t, NORM, lambda w: w.to(torch.float8_e4m3fn)), UnsupportedModel, rf"{NORM}.*F8_E4M3"),
        (lambda t: {**t, "model.layers.3.mlp.up_proj.weight": t[UP].clone()}, BrokenModel, r"model\.layers\.3"),
        (lambda t: {**t, "model.layers.0.mlp.experts.weight": t[UP].clone()}, BrokenModel, "experts"),
        (lambda t: {**t, "model.layers.0.self_attn.q_proj.bias": torch.ones(128)}, BrokenModel, r"q_proj\.bias"),
        (lambda t: {**t, "language_model.norm.weight": t[NORM].clone()}, BrokenModel, r"norm\.weight.*both hold final_norm"),
        (lambda t: {}, BrokenModel, "lack embedding"),
    ],
)
def test_wrong_tensors_are_named(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], error: type[ModelError], names: str, saved: Saved, tmp_path: Path
) -> None:
    oracle, _ = saved("llama", torch.float32)
    oracle.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(error, match=names):
        load_folder(tmp_path, TorchKernels("cpu"))


def test_float64_and_mixed_dtypes_load(saved: Saved, kernels: Kernels, tmp_path: Path) -> None:
    oracle, _ = saved("llama", torch.float32)
    oracle.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    kinds = (torch.float64, torch.float32, torch.bfloat16)
    save_file({name: tensor.to(kinds[i % 3]) for i, (name, tensor) in enumerate(load_file(path).items())}, path)
    ids = prompt_ids(20)
    assert (PagedRun(load_folder(tmp_path, kernels)).logits(ids, [20]) - hf_logits(oracle, ids)).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"model_type": "mamba"}, UnsupportedModel, "'mamba'"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModel, "'gptq'"),
        ({"vocab_size": 0}, BrokenModel, "'vocab_size'"),
    ],
)
def test_configs_are_refused_before_weights_are_read(
    change: dict[str, object], error: type[ModelError], names: str, saved: Saved, tmp_path: Path
) -> None:
    saved("llama", torch.float32)[0].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(error, match=names):
        open_model(ModelConfig(model=str(tmp_path)))


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1'])
def test_a_config_that_is_no_json_object(text: str, saved: Saved, tmp_path: Path) -> None:
    saved("llama", torch.float32)[0].save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BrokenModel, match=r"config\.json"):
        open_model(ModelConfig(model=str(tmp_path)))


def test_eos_ids_of_the_generation_config_are_added(saved: Saved, tmp_path: Path) -> None:
    saved("llama", torch.float32)[0].save_pretrained(tmp_path)
    own = spec_of(tmp_path).eos_token_ids
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    source = open_model(ModelConfig(model=str(tmp_path)))
    source.close()
    assert source.eos_token_ids == (*own, 5, 6)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(BrokenModel, match=r"generation_config\.json.*eos_token_id"):
        open_model(ModelConfig(model=str(tmp_path)))


@pytest.mark.parametrize("name", ["llama-rope3-bias-tied", "qwen2", "gemma3"])
def test_dummy_weights(name: str, saved: Saved, kernels: Kernels) -> None:
    """Everything is filled, the values are small and random, the same for the same seed."""
    spec = spec_of(saved(name, torch.float32)[1])
    models = [DecoderModel(spec, kernels, torch.bfloat16, MAX_LEN, torch.device("cpu")) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        fill_dummy(model, lambda *_: None, seed)
    results = [PagedRun(model).logits(prompt_ids(20), [20]) for model in models]
    assert results[0].isfinite().all() and torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    first, second = models[0].weights.layers[0].down.to_dense(), models[0].weights.layers[1].down.to_dense()
    assert not torch.equal(first, second) and first.float().std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("name", ["llama", "llama-rope3-bias-tied", "qwen2", "qwen3", "gemma3"])
def test_weight_bytes_are_known_before(name: str, saved: Saved, kernels: Kernels) -> None:
    model = load_folder(saved(name, torch.float32)[1], kernels)
    weights = model.weights
    matrices = {id(w): w for w in (weights.embedding, weights.lm_head)}
    vectors = [weights.final_norm]
    for layer in weights.layers:
        for part in (getattr(layer, field) for field in layer.__dataclass_fields__):
            if isinstance(part, Tensor):
                vectors.append(part)
            elif part is not None:
                matrices[id(part)] = part
    held = sum(w.num_bytes for w in matrices.values()) + sum(v.nbytes for v in vectors)
    assert model.weight_bytes == held == weights_num_bytes(model.spec, kernels, torch.float32)


CHILD = """
import json, sys
from pathlib import Path
import torch
from brim.config.model_source import open_model
from brim.config.schema import ModelConfig
from brim.kernels.select import select_kernels
from brim.models.decoder import DecoderModel
from brim.models.loader import load_weights

def status(key):
    return next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))

kernels = select_kernels("cpu", 2).kernels
source = open_model(ModelConfig(model=sys.argv[1]))
warm = torch.zeros(8, 16) @ torch.zeros(16, 8)
before = status("VmRSS")
model = DecoderModel(source.spec, kernels, torch.float32, 64, torch.device("cpu"))
load_weights(model, source.weights, kernels, lambda *_: None)
source.close()
print(json.dumps({"weights": model.weight_bytes, "peak": status("VmHWM") - before, "after": status("VmRSS") - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's account of a process")
def test_loading_holds_one_chunk_beside_the_model(tmp_path: Path) -> None:
    """80 MiB of weights, of which one tensor alone is 32 MiB: the peak stays within two chunks of the model, and at the end
    nothing but the model is there. Beside them the allocation touches 5 MiB of code pages of torch."""
    hidden, inner, vocab = 512, 2048, 16384
    config = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    tensors = {"model.embed_tokens.weight": torch.ones(vocab, hidden), "model.norm.weight": torch.ones(hidden)}
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        for part in "qkvo":
            tensors[f"{prefix}self_attn.{part}_proj.weight"] = torch.ones(hidden, hidden)
        for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            tensors[f"{prefix}mlp.{part}_proj.weight"] = torch.ones(*shape)
        for part in ("input", "post_attention"):
            tensors[f"{prefix}{part}_layernorm.weight"] = torch.ones(hidden)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, check=True)
    figures = json.loads(run.stdout)
    print({name: f"{value / MIB:.1f} MiB" for name, value in figures.items()})
    assert figures["weights"] > 75 * MIB
    assert figures["peak"] <= figures["weights"] + 2 * CHUNK_BYTES + 8 * MIB
    assert figures["after"] <= figures["weights"] + 8 * MIB
