"""The architecture of a model in numbers, read from its config.json or GGUF header. Owns the translation from foreign
field names to ours, and refuses what Brim cannot run. Torch-free: planning and layout start here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from brim.errors import BrokenModel, UnsupportedModel

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gemma3"]
AttentionKind = Literal["full", "sliding"]
ActivationName = Literal["silu", "gelu_tanh"]

_HF_FAMILIES: dict[str, Family] = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
}
_GGUF_FAMILIES: dict[str, Family] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3"}
_ACTIVATIONS: dict[str, ActivationName] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding of one attention kind. scaling: None, "linear", "llama3", "dynamic"-free set only."""

    theta: float
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One dense decoder-only transformer. Counts are exact; layer_kinds has one entry a layer."""

    family: Family
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    max_position: int
    layer_kinds: tuple[AttentionKind, ...]
    sliding_window: int  # 0 where no layer slides
    rope_full: RopeSpec
    rope_sliding: RopeSpec
    activation: ActivationName
    tie_word_embeddings: bool
    attention_bias: bool  # on q, k, v
    output_bias: bool  # on o
    mlp_bias: bool
    qk_norm: bool
    norm_plus_one: bool  # stored norm weights mean (1 + w)
    sandwich_norms: bool
    embedding_scale: float
    attention_scale: float
    attention_softcap: float
    logit_softcap: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    stored_dtype: str  # dtype the files declare: bfloat16, float16, float32

    @property
    def num_parameters(self) -> int:
        """Weights in elements, embeddings counted once when tied (worked example: the demo model has 268,098,176)."""
        head_dims = self.num_heads * self.head_dim
        kv_dims = self.num_kv_heads * self.head_dim
        layer = self.hidden_size * (2 * head_dims + 2 * kv_dims) + 3 * self.hidden_size * self.intermediate_size
        layer += self.hidden_size * (4 if self.sandwich_norms else 2) + (2 * self.head_dim if self.qk_norm else 0)
        layer += (head_dims + 2 * kv_dims) * self.attention_bias + self.hidden_size * self.output_bias
        layer += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_layers * layer + self.hidden_size


def spec_from_hf_config(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Hugging Face config.json (its text part for multimodal wrappers).

    Raises UnsupportedModel for architectures, quantisations or features Brim lacks; BrokenModel for missing or absurd fields.
    """
    if "text_config" in config and config.get("model_type") == "gemma3":
        outer = config
        config = {**config["text_config"]}
        for key in ("eos_token_id", "bos_token_id", "torch_dtype", "dtype"):
            config.setdefault(key, outer.get(key))
    model_type = str(config.get("model_type", "missing"))
    family = _HF_FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedModel(f"Architecture '{model_type}' is not supported; Brim runs {', '.join(sorted(set(_HF_FAMILIES)))}.")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModel(f"Quantisation '{method}' is not supported; use the unquantised model or a GGUF file.")
    return _Reader(config, family).spec()


class _Reader:
    """Reads one config.json with defaults as `transformers` documents them, naming what is missing."""

    def __init__(self, config: Mapping[str, Any], family: Family) -> None:
        self._config = config
        self._family = family

    def spec(self) -> ModelSpec:
        family = self._family
        gemma = family == "gemma3"
        hidden_size = self._count("hidden_size")
        num_heads = self._count("num_attention_heads")
        head_dim = self._count("head_dim", 256 if gemma else hidden_size // num_heads)
        num_kv_heads = self._count("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise BrokenModel(f"config.json: {num_heads} attention heads cannot be grouped over {num_kv_heads} kv heads.")
        kinds, window = self._layer_kinds()
        scalar = self._config.get("query_pre_attn_scalar", 256) if gemma else head_dim
        bias = bool(self._config.get("attention_bias", False))
        return ModelSpec(
            family=family,
            vocab_size=self._count("vocab_size", 262_208 if gemma else None),
            hidden_size=hidden_size,
            num_layers=len(kinds),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=self._count("intermediate_size"),
            rms_norm_eps=self._number("rms_norm_eps", 1e-6),
            max_position=self._count("max_position_embeddings", 131_072 if gemma else None),
            layer_kinds=kinds,
            sliding_window=window,
            rope_full=self._rope("full_attention", 1_000_000.0 if gemma else 10_000.0),
            rope_sliding=self._rope("sliding_attention", 10_000.0),
            activation=self._activation(),
            tie_word_embeddings=bool(self._config.get("tie_word_embeddings", gemma)),
            attention_bias=bias or family == "qwen2",
            output_bias=bias and family in ("llama", "gemma3", "qwen3"),
            mlp_bias=bool(self._config.get("mlp_bias", False)),
            qk_norm=family in ("qwen3", "gemma3"),
            norm_plus_one=gemma,
            sandwich_norms=gemma,
            embedding_scale=math.sqrt(hidden_size) if gemma else 1.0,
            attention_scale=float(scalar) ** -0.5,
            attention_softcap=float(self._config.get("attn_logit_softcapping") or 0.0),
            logit_softcap=float(self._config.get("final_logit_softcapping") or 0.0),
            bos_token_id=self._bos(),
            eos_token_ids=_ids(self._config.get("eos_token_id")),
            stored_dtype=str(self._config.get("torch_dtype") or self._config.get("dtype") or "bfloat16"),
        )

    def _count(self, key: str, default: int | None = None) -> int:
        value = self._config.get(key)
        if value is None:
            value = default
        if value is None:
            raise BrokenModel(f"config.json has no '{key}'; download the model again.")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            raise BrokenModel(f"config.json: '{key}' is {value!r}, not a positive whole number.")
        return value

    def _number(self, key: str, default: float) -> float:
        value = self._config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BrokenModel(f"config.json: '{key}' is {value!r}, not a number.")
        return float(value)

    def _bos(self) -> int | None:
        ids = _ids(self._config.get("bos_token_id"))
        return ids[0] if ids else None

    def _activation(self) -> ActivationName:
        gemma = self._family == "gemma3"
        name = self._config.get("hidden_activation") if gemma else None
        name = name or self._config.get("hidden_act") or ("gelu_pytorch_tanh" if gemma else "silu")
        if name not in _ACTIVATIONS:
            raise UnsupportedModel(f"Activation '{name}' is not supported; Brim has {', '.join(_ACTIVATIONS)}.")
        return _ACTIVATIONS[name]

    def _layer_kinds(self) -> tuple[tuple[AttentionKind, ...], int]:
        num_layers = self._count("num_hidden_layers")
        window = int(self._config.get("sliding_window") or (4096 if self._family == "gemma3" else 0))
        if self._family in ("qwen2", "qwen3") and not self._config.get("use_sliding_window", False):
            return (_kind(False),) * num_layers, 0
        kinds: tuple[AttentionKind, ...]
        named = self._config.get("layer_types")
        if named:
            kinds = tuple(_kind(k == "sliding_attention") for k in named)
            if len(kinds) != num_layers:
                raise BrokenModel(f"config.json: layer_types names {len(kinds)} of {num_layers} layers.")
        elif self._family == "gemma3":
            names = ("sliding_window_pattern", "_sliding_window_pattern")
            pattern = next((int(self._config[n]) for n in names if self._config.get(n)), 6)
            kinds = tuple(_kind((i + 1) % pattern != 0) for i in range(num_layers))
        elif self._family in ("qwen2", "qwen3"):
            first = int(self._config.get("max_window_layers", 0))
            kinds = tuple(_kind(i >= first) for i in range(num_layers))
        else:
            kinds = (_kind(self._family == "mistral" and window > 0),) * num_layers
        return kinds, window if "sliding" in kinds else 0

    def _rope(self, kind: str, default_theta: float) -> RopeSpec:
        local = kind == "sliding_attention" and self._family == "gemma3"
        theta = self._config.get("rope_local_base_freq", default_theta) if local else self._config.get("rope_theta")
        raw = self._config.get("rope_parameters") or self._config.get("rope_scaling") or {}
        if kind in raw:
            raw = raw[kind]
        elif local:
            raw = {}
        theta = raw.get("rope_theta", theta if theta is not None else default_theta)
        scaling = raw.get("rope_type") or raw.get("type") or "default"
        if scaling in ("default", "none"):
            return RopeSpec(theta=float(theta))
        if scaling == "linear":
            return RopeSpec(theta=float(theta), scaling="linear", factor=float(raw["factor"]))
        if scaling == "llama3":
            return RopeSpec(
                theta=float(theta),
                scaling="llama3",
                factor=float(raw["factor"]),
                low_freq_factor=float(raw["low_freq_factor"]),
                high_freq_factor=float(raw["high_freq_factor"]),
                original_max_position=int(raw["original_max_position_embeddings"]),
            )
        raise UnsupportedModel(f"Rope scaling '{scaling}' is not supported; Brim has default, linear and llama3.")


def spec_from_gguf(metadata: Mapping[str, Any], tensor_shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    """The spec of a GGUF header. Field names: the GGUF specification's `{arch}.*` keys (ggml docs/gguf.md)."""
    arch = str(metadata.get("general.architecture", "missing"))
    family = _GGUF_FAMILIES.get(arch)
    if family is None:
        raise UnsupportedModel(f"GGUF architecture '{arch}' is not supported; Brim runs {', '.join(_GGUF_FAMILIES)}.")

    def need(key: str) -> Any:
        value = metadata.get(f"{arch}.{key}")
        if value is None:
            raise BrokenModel(f"The GGUF header has no '{arch}.{key}'; download or convert the file again.")
        return value

    heads = int(need("attention.head_count"))
    hidden = int(need("embedding_length"))
    embedding = tensor_shapes.get("token_embd.weight")
    if embedding is None:
        raise BrokenModel("The GGUF file has no tensor 'token_embd.weight'; download or convert the file again.")
    head_dim = int(metadata.get(f"{arch}.attention.key_length", hidden // heads))
    config: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": int(need("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(metadata.get(f"{arch}.attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "intermediate_size": int(need("feed_forward_length")),
        "rms_norm_eps": float(need("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": int(need("context_length")),
        "vocab_size": embedding[0],
        "tie_word_embeddings": "output.weight" not in tensor_shapes,
        "rope_theta": float(metadata.get(f"{arch}.rope.freq_base", 1e6 if family == "gemma3" else 1e4)),
        "sliding_window": metadata.get(f"{arch}.attention.sliding_window"),
        "query_pre_attn_scalar": head_dim,
        "attn_logit_softcapping": metadata.get(f"{arch}.attn_logit_softcapping"),
        "final_logit_softcapping": metadata.get(f"{arch}.final_logit_softcapping"),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _gguf_eos(metadata),
        "torch_dtype": "bfloat16",
    }
    scaling = metadata.get(f"{arch}.rope.scaling.type")
    if scaling not in (None, "none"):
        config["rope_scaling"] = {"rope_type": scaling, "factor": metadata.get(f"{arch}.rope.scaling.factor", 1.0)}
    if family == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensor_shapes
    return _Reader(config, family).spec()


def _kind(slides: bool) -> AttentionKind:
    return "sliding" if slides else "full"


def _gguf_eos(metadata: Mapping[str, Any]) -> list[int]:
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return [int(metadata[key]) for key in keys if metadata.get(key) is not None]


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(dict.fromkeys(int(v) for v in value)) if isinstance(value, (list, tuple)) else (int(value),)
