"""Small random models of every family, and a paged run of ours beside `transformers`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from brim.config.model_spec import ModelSpec, spec_from_hf_config
from brim.formats.safetensors_file import open_safetensors
from brim.kernels.base import Kernels
from brim.memory.kv_layout import KVLayout
from brim.memory.step_memory import StepLimits
from brim.models.base import StepTensors
from brim.models.decoder import DecoderModel
from brim.models.loader import load_weights
from brim.worker.step_inputs import StepArrays, StepInputs

VOCAB = 517
MAX_TOKENS = 64
MAX_LEN = 256
BLOCK_SIZE = 16
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 208, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": MAX_LEN,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
GEMMA = {**COMMON, "num_hidden_layers": 7, "num_key_value_heads": 1, "head_dim": 64, "sliding_window": 24}

CONFIGS = {
    "llama": lambda: LlamaConfig(**COMMON),
    "llama-rope3-bias-tied": lambda: LlamaConfig(
        **COMMON, rope_parameters=LLAMA3_ROPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama-linear-rope": lambda: LlamaConfig(
        **COMMON, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, rms_norm_eps=1e-5
    ),
    "llama-head-64": lambda: LlamaConfig(**{**COMMON, "num_key_value_heads": 4, "head_dim": 64}),
    "llama-head-80": lambda: LlamaConfig(**{**COMMON, "hidden_size": 320, "num_attention_heads": 4, "num_key_value_heads": 1}),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**COMMON, sliding_window=24),
    "qwen2": lambda: Qwen2Config(**COMMON),
    "qwen2-tied-window": lambda: Qwen2Config(
        **COMMON, tie_word_embeddings=True, use_sliding_window=True, sliding_window=20, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=64),
    "qwen3-tied-bias": lambda: Qwen3Config(**COMMON, head_dim=48, tie_word_embeddings=True, attention_bias=True),
    "gemma3": lambda: Gemma3TextConfig(**GEMMA, query_pre_attn_scalar=64),
    "gemma3-scaled": lambda: Gemma3TextConfig(
        **{**GEMMA, "num_hidden_layers": 4, "num_key_value_heads": 2},
        query_pre_attn_scalar=100,
        final_logit_softcapping=3.0,
        layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}  # fmt: skip


def random_model(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A `transformers` model whose norms and biases are random too and whose logits spread over several units."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(2.0)
            parameter.copy_(parameter.bfloat16())  # the same values in every dtype
    return model.to(dtype)


def prompt_ids(count: int = 60) -> Tensor:
    """[count] int64, always the same."""
    return torch.from_numpy(np.random.default_rng(5).integers(0, VOCAB, count))


def hf_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """[len(ids), vocab] float32."""
    with torch.no_grad():
        return model(ids[None]).logits[0].float()


def spec_of(folder: Path) -> ModelSpec:
    """The spec of a saved model."""
    return spec_from_hf_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def load_folder(folder: Path, kernels: Kernels, dtype: torch.dtype = torch.float32) -> DecoderModel:
    """A saved model, loaded."""
    model = DecoderModel(spec_of(folder), kernels, dtype, MAX_LEN, torch.device("cpu"))
    source = open_safetensors(sorted(folder.glob("*.index.json")) or sorted(folder.glob("*.safetensors")))
    try:
        load_weights(model, source, kernels, lambda *_: None)
    finally:
        source.close()
    return model


@dataclass
class PagedRun:
    """One sequence through our model over a cache of scattered blocks. Whatever is not written is NaN."""

    model: DecoderModel
    block_order_seed: int = 0
    num_blocks: int = 40
    tables: tuple[np.ndarray, ...] = field(init=False)

    def __post_init__(self) -> None:
        spec, dtype = self.model.spec, self.model.dtype
        layout = KVLayout.of(spec, BLOCK_SIZE, dtype.itemsize)
        self._inputs = StepInputs(StepLimits(2, MAX_TOKENS, MAX_LEN), layout, torch.device("cpu"))
        caches: dict[int, Tensor] = {}
        tables = []
        rng = np.random.default_rng(self.block_order_seed)
        for group in layout.groups:
            shape = (self.num_blocks, len(group.layers), 2, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim)
            pool = torch.full(shape, float("nan"), dtype=dtype)
            caches.update((layer, pool[:, j]) for j, layer in enumerate(group.layers))
            tables.append(rng.permutation(np.arange(1, self.num_blocks))[: MAX_LEN // BLOCK_SIZE].astype(np.int32)[None])
        self.tables = tuple(tables)
        self._caches = [caches[i] for i in range(spec.num_layers)]
        self._buffers = {
            shape.name: torch.full((MAX_TOKENS, shape.width), float("nan"), dtype=shape.dtype)
            for shape in self.model.buffer_shapes()
        }

    def use_buffers(self, buffers: dict[str, Tensor]) -> None:
        """Temporaries that may share bytes, in place of the own ones."""
        self._buffers = buffers

    def logits(self, ids: Tensor, chunks: Sequence[int]) -> Tensor:
        """[len(ids), vocab] float32, computed in chunks of these lengths."""
        assert sum(chunks) == len(ids)
        ends = np.cumsum(chunks).tolist()
        return torch.cat([self.chunk(ids, end - count, count) for count, end in zip(chunks, ends, strict=True)])

    def chunk(self, ids: Tensor, start: int, count: int, wanted: Sequence[int] | None = None, last_alone: bool = False) -> Tensor:
        """[count, vocab] float32 of one step over ids[start : start + count], or [len(wanted), vocab] of those rows of it.
        last_alone: the first of them is the last token and the others padding; the last layer attends for that one only."""
        arrays = StepArrays(
            ids[start : start + count].numpy(),
            np.array([count], np.int32),
            np.array([start], np.int32),
            self.tables,
            np.array([0], np.int32),
        )
        inputs, batches = self._inputs, self._inputs.fill(arrays)
        rows = None if wanted is None else torch.tensor(wanted, dtype=torch.int64)
        alone = inputs.last_tokens(1, start + count) if last_alone else None
        step = StepTensors(inputs.ids[:count], inputs.positions[:count], batches, self._caches, self._buffers, rows, alone)
        hidden = self.model.forward(step)
        out = torch.full((len(hidden), self.model.spec.vocab_size), float("nan"))
        if len(hidden):
            self.model.logits(hidden, out)
        return out


def chunkings(count: int) -> dict[str, list[int]]:
    """One prefill, chunks of seven, token by token, and a prefill followed by single tokens."""
    sevens = [7] * (count // 7) + ([count % 7] if count % 7 else [])
    return {"whole": [count], "sevens": sevens, "single": [1] * count, "decode": [count - 9] + [1] * 9}
