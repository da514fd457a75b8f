"""Writes a random `transformers` model as a GGUF file the way llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}


def write_gguf(model: PreTrainedModel, path: Path, kind: gguf.GGMLQuantizationType, *, skip: str = "", **extra: Any) -> Path:
    """Matrices stored as `kind`, vectors as F32; `skip` leaves one tensor out; extra tensors by name (dots as __)."""
    config = model.config
    architecture = _ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _write_header(writer, config)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = _converted(name, tensor.float(), config).numpy()
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        if stored == skip:
            continue
        as_kind = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else kind
        writer.add_tensor(stored, gguf.quants.quantize(values, as_kind), raw_dtype=as_kind)
    for name, values in extra.items():
        writer.add_tensor(name.replace("__", "."), np.asarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rounded(model: PreTrainedModel, kind: gguf.GGMLQuantizationType) -> None:
    """Give the model, in place, the values its file of this kind holds."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                stored = gguf.quants.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(stored, kind))))


def _write_header(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)


def _converted(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """llama.cpp: q and k of Llama models go from rotated halves to interleaved pairs, Gemma's norms get their one."""
    if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        return tensor + 1
    for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if config.model_type in ("llama", "mistral") and part in name:
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
            return halves.swapaxes(1, 2).reshape(tensor.shape)
    return tensor
