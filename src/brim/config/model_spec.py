"""The architecture of a model in numbers, read from its config.json or GGUF header. Owns the translation from foreign
field names to ours, and refuses what Brim cannot run. Torch-free: planning and layout start here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
_DEFAULT_WINDOW = 4096  # of every family that has one
# what an absent key means; a wrapper stores its text part without what equals these
_DEFAULT_COUNTS: dict[Family, dict[str, int]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "gemma3": {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
    },
}
_MOST_LAYERS = 1024
_GEMMA3_27B_LAYERS = 62
_GGUF_EOS_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding of one attention kind. divisors: one a frequency (llama3 scaling as GGUF files store it), or none."""

    theta: float
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    divisors: tuple[float, ...] = ()


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
        if not isinstance(config["text_config"], Mapping):
            raise BrokenModel("config.json: 'text_config' is not an object; download the model again.")
        config = {**config["text_config"]}
        for key in ("eos_token_id", "bos_token_id", "torch_dtype", "dtype", "quantization_config"):
            config.setdefault(key, outer.get(key))
    model_type = str(config.get("model_type", "missing"))
    family = _HF_FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedModel(f"Architecture '{model_type}' is not supported; Brim runs {', '.join(sorted(set(_HF_FAMILIES)))}.")
    quantisation = config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, Mapping) else quantisation
        raise UnsupportedModel(f"Quantisation '{method}' is not supported; use the unquantised model or a GGUF file.")
    return _Reader(config, family, "config.json").spec()


class _Reader:
    """Reads one config.json with defaults as `transformers` documents them, naming what is missing."""

    def __init__(self, config: Mapping[str, Any], family: Family, where: str, rope_divisors: Sequence[float] = ()) -> None:
        self._config = config
        self._family = family
        self._where = where
        self._divisors = tuple(rope_divisors)

    def spec(self) -> ModelSpec:
        family = self._family
        gemma = family == "gemma3"
        self._refuse_features()
        hidden_size = self._count("hidden_size")
        num_heads = self._count("num_attention_heads")
        head_dim = self._count("head_dim", _DEFAULT_COUNTS[family].get("head_dim", hidden_size // num_heads))
        if head_dim % 2:
            raise BrokenModel(f"{self._where}: 'head_dim' is {head_dim}, which rotary embedding cannot halve.")
        is_null = "num_key_value_heads" in self._config  # null: as many as query heads; absent: the family's default
        kv_default = num_heads if is_null else _DEFAULT_COUNTS[family].get("num_key_value_heads", num_heads)
        num_kv_heads = self._count("num_key_value_heads", kv_default)
        if num_heads % num_kv_heads:
            raise BrokenModel(f"{self._where}: {num_heads} attention heads cannot be grouped over {num_kv_heads} kv heads.")
        kinds, window = self._layer_kinds()
        scalar = self._number("query_pre_attn_scalar", 256.0, positive=True) if gemma else float(head_dim)
        bias = bool(self._config.get("attention_bias", False))
        return ModelSpec(
            family=family,
            vocab_size=self._count("vocab_size"),
            hidden_size=hidden_size,
            num_layers=len(kinds),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=self._count("intermediate_size"),
            rms_norm_eps=self._number("rms_norm_eps", 1e-6, positive=True),
            max_position=self._count("max_position_embeddings"),
            layer_kinds=kinds,
            sliding_window=window,
            rope_full=self._rope("full_attention", 1_000_000.0 if gemma else 10_000.0),
            rope_sliding=self._rope("sliding_attention", 10_000.0),
            activation=self._activation(),
            tie_word_embeddings=bool(self._config.get("tie_word_embeddings", gemma)),
            attention_bias=bias or family == "qwen2",
            output_bias=bool(self._config.get("output_bias", bias and family in ("llama", "gemma3", "qwen3"))),
            mlp_bias=bool(self._config.get("mlp_bias", False)),
            qk_norm=family in ("qwen3", "gemma3"),
            norm_plus_one=gemma,
            sandwich_norms=gemma,
            embedding_scale=math.sqrt(hidden_size) if gemma else 1.0,
            attention_scale=scalar**-0.5,
            attention_softcap=self._number("attn_logit_softcapping", 0.0),
            logit_softcap=self._number("final_logit_softcapping", 0.0),
            bos_token_id=next(iter(self._ids("bos_token_id")), None),
            eos_token_ids=self._ids("eos_token_id"),
            stored_dtype=str(self._config.get("torch_dtype") or self._config.get("dtype") or "bfloat16"),
        )

    def _refuse_features(self) -> None:
        """What would silently give other results."""
        rope = self._config.get("rope_parameters")
        for source in (self._config, rope if isinstance(rope, Mapping) else {}):
            if source.get("partial_rotary_factor") not in (None, 1, 1.0):
                raise UnsupportedModel("Rotary embedding of a part of the head (partial_rotary_factor) is not supported.")
        if self._config.get("use_bidirectional_attention"):
            raise UnsupportedModel("An embedding model (use_bidirectional_attention) is not supported; Brim generates text.")

    def _count(self, key: str, default: int | None = None, most: int = (1 << 31) - 1) -> int:
        value = self._config.get(key)
        if value is None:
            value = _DEFAULT_COUNTS[self._family].get(key) if default is None else default
        if value is None:
            raise BrokenModel(f"{self._where} has no '{key}'; download the model again.")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise BrokenModel(f"{self._where}: '{key}' is {value!r}, not a whole number from 1 to {most}.")
        return value

    def _number(self, key: str, default: float, *, positive: bool = False) -> float:
        value = self._config.get(key)
        return _number(self._where, key, default if value is None else value, positive=positive)

    def _ids(self, key: str) -> tuple[int, ...]:
        value = self._config.get(key)
        ids = () if value is None else value if isinstance(value, (list, tuple)) else (value,)
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise BrokenModel(f"{self._where}: '{key}' is {value!r}, not a token id or a list of them.")
        return tuple(dict.fromkeys(ids))

    def _activation(self) -> ActivationName:
        gemma = self._family == "gemma3"
        name = self._config.get("hidden_activation") if gemma else None
        name = name or self._config.get("hidden_act") or ("gelu_pytorch_tanh" if gemma else "silu")
        if not isinstance(name, str) or name not in _ACTIVATIONS:
            raise UnsupportedModel(f"Activation '{name}' is not supported; Brim has {', '.join(_ACTIVATIONS)}.")
        return _ACTIVATIONS[name]

    def _layer_kinds(self) -> tuple[tuple[AttentionKind, ...], int]:
        """One kind a layer, and the window (0 where none slides). An absent sliding_window is 4,096, null is none."""
        num_layers = self._count("num_hidden_layers", most=_MOST_LAYERS)
        qwen, gemma = self._family in ("qwen2", "qwen3"), self._family == "gemma3"
        has_window = gemma or self._config.get("sliding_window", _DEFAULT_WINDOW) not in (None, 0)
        if not has_window or self._family == "llama" or (qwen and not self._config.get("use_sliding_window", False)):
            return (_kind(False),) * num_layers, 0
        kinds: tuple[AttentionKind, ...]
        named = self._config.get("layer_types")
        if named and self._family != "mistral":
            kinds = self._named_kinds(named, num_layers)
        elif gemma:
            keys = ("sliding_window_pattern", "_sliding_window_pattern")
            pattern = self._count(next((key for key in keys if self._config.get(key)), keys[0]), 6)
            kinds = tuple(_kind((i + 1) % pattern != 0) for i in range(num_layers))
        elif qwen:
            first = int(self._number("max_window_layers", 28))
            kinds = tuple(_kind(i >= first) for i in range(num_layers))
        else:
            kinds = (_kind(True),) * num_layers
        return kinds, self._count("sliding_window", _DEFAULT_WINDOW) if "sliding" in kinds else 0

    def _named_kinds(self, named: Any, num_layers: int) -> tuple[AttentionKind, ...]:
        if not isinstance(named, (list, tuple)) or len(named) != num_layers:
            raise BrokenModel(f"{self._where}: layer_types does not name the kinds of {num_layers} layers.")
        for name in named:
            if name not in ("full_attention", "sliding_attention"):
                raise UnsupportedModel(f"Layers of type '{name}' are not supported; Brim has full and sliding attention.")
        return tuple(_kind(name == "sliding_attention") for name in named)

    def _rope(self, kind: str, default_theta: float) -> RopeSpec:
        local = kind == "sliding_attention" and self._family == "gemma3"
        theta = self._number("rope_local_base_freq" if local else "rope_theta", default_theta, positive=True)
        key = "rope_parameters" if self._config.get("rope_parameters") else "rope_scaling"
        raw = self._config.get(key) or {}
        if isinstance(raw, Mapping) and kind in raw:
            raw = raw[kind]
        elif local:
            raw = {}
        if not isinstance(raw, Mapping):
            raise BrokenModel(f"{self._where}: '{key}' is {raw!r}, not an object.")

        def need(name: str, default: float | None = None) -> float:
            value = raw.get(name, default)
            if value is None:
                raise BrokenModel(f"{self._where}: '{key}' has no '{name}'; download the model again.")
            return _number(self._where, name, value, positive=True)

        theta = need("rope_theta", theta)
        scaling = raw.get("rope_type") or raw.get("type") or "default"
        if scaling in ("default", "none"):
            return RopeSpec(theta=theta, divisors=self._divisors)
        if scaling == "linear":
            return RopeSpec(theta=theta, scaling="linear", factor=need("factor"))
        if scaling == "llama3":
            return RopeSpec(
                theta=theta,
                scaling="llama3",
                factor=need("factor"),
                low_freq_factor=need("low_freq_factor"),
                high_freq_factor=need("high_freq_factor"),
                original_max_position=int(need("original_max_position_embeddings")),
            )
        raise UnsupportedModel(f"Rope scaling '{scaling}' is not supported; Brim has default, linear and llama3.")


def spec_from_gguf(
    metadata: Mapping[str, Any], tensor_shapes: Mapping[str, tuple[int, ...]], rope_divisors: Sequence[float] = ()
) -> ModelSpec:
    """The spec of a GGUF header. Field names: the GGUF specification's `{arch}.*` keys (ggml docs/gguf.md).

    rope_divisors: the values of the tensor `rope_freqs.weight`, in which converters keep llama3's rope scaling.
    """
    arch = str(metadata.get("general.architecture", "missing"))
    family = _GGUF_FAMILIES.get(arch)
    if family is None:
        raise UnsupportedModel(f"GGUF architecture '{arch}' is not supported; Brim runs {', '.join(_GGUF_FAMILIES)}.")
    header = _Header(metadata, arch)
    heads, hidden = header.count("attention.head_count"), header.count("embedding_length")
    embedding = tensor_shapes.get("token_embd.weight")
    if embedding is None:
        raise BrokenModel("The GGUF file has no tensor 'token_embd.weight'; download or convert the file again.")
    head_dim = header.count("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if header.count(key, head_dim) != head_dim:
            raise UnsupportedModel(f"GGUF: '{arch}.{key}' differs from the {head_dim} of each head, which is not supported.")
    if header.get("expert_count"):
        raise UnsupportedModel(f"A mixture of experts ('{arch}.expert_count') is not supported; Brim runs dense models.")
    if rope_divisors and len(rope_divisors) != head_dim // 2:
        raise BrokenModel(f"Tensor 'rope_freqs.weight' has {len(rope_divisors)} values for heads of {head_dim}.")
    layers = header.count("block_count")
    config: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": header.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": header.count("feed_forward_length"),
        "rms_norm_eps": header.need("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": header.count("context_length"),
        "vocab_size": embedding[0],
        "tie_word_embeddings": "output.weight" not in tensor_shapes,
        "rope_theta": header.get("rope.freq_base"),
        "rope_local_base_freq": header.get("rope.freq_base_swa"),
        "sliding_window": header.get("attention.sliding_window"),
        # not in the header; as llama.cpp does, the 27B model of 62 layers is told by their number
        "query_pre_attn_scalar": hidden // heads if layers == _GEMMA3_27B_LAYERS else head_dim,
        "attn_logit_softcapping": header.get("attn_logit_softcapping"),
        "final_logit_softcapping": header.get("final_logit_softcapping"),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [metadata[key] for key in _GGUF_EOS_KEYS if metadata.get(key) is not None],
        "torch_dtype": "bfloat16",
    }
    scaling = header.get("rope.scaling.type")
    if scaling not in (None, "none"):
        config["rope_scaling"] = {"rope_type": scaling, "factor": header.get("rope.scaling.factor")}
    if family == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensor_shapes
        config["output_bias"] = "blk.0.attn_output.bias" in tensor_shapes
    return _Reader(config, family, "The GGUF header", rope_divisors).spec()


class _Header:
    """The `{arch}.*` keys of one GGUF header."""

    def __init__(self, metadata: Mapping[str, Any], arch: str) -> None:
        self._metadata = metadata
        self._arch = arch

    def get(self, key: str) -> Any:
        return self._metadata.get(f"{self._arch}.{key}")

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise BrokenModel(f"The GGUF header has no '{self._arch}.{key}'; download or convert the file again.")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number, or an array that says the same number for every layer."""
        value = self.need(key) if default is None or self.get(key) is not None else default
        if not isinstance(value, (int, float, str, bool)):
            distinct = set(value.tolist()) if hasattr(value, "tolist") else set()
            if len(distinct) != 1:
                raise UnsupportedModel(f"GGUF: '{self._arch}.{key}' differs from layer to layer, which is not supported.")
            value = distinct.pop()
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise BrokenModel(f"The GGUF header: '{self._arch}.{key}' is {value!r}, not a positive whole number.")
        return value


def _kind(slides: bool) -> AttentionKind:
    return "sliding" if slides else "full"


def _number(where: str, name: str, value: Any, *, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30 or (positive and value <= 0):
        raise BrokenModel(f"{where}: '{name}' is {value!r}, not a {'positive ' if positive else ''}number.")
    return float(value)
