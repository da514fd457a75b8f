"""Specs from config.json and from GGUF headers: known models in full, defaults, refusals, and anything else as a BrimError."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.config.model_spec import ModelSpec, spec_from_gguf, spec_from_hf_config
from brim.errors import BrokenModel, ModelError, UnsupportedModel

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
GGUF: dict[str, Any] = {
    "general.architecture": "llama", "llama.embedding_length": 64, "llama.block_count": 2, "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2, "llama.feed_forward_length": 96, "llama.context_length": 128,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip
SHAPES = {"token_embd.weight": (100, 64), "output.weight": (100, 64)}


def hf(**changes: Any) -> ModelSpec:
    return spec_from_hf_config({key: value for key, value in {**LLAMA, **changes}.items() if value != "absent"})


def gguf(architecture: str = "llama", **changes: Any) -> ModelSpec:
    renamed = {key.replace("llama.", f"{architecture}.", 1): value for key, value in GGUF.items()}
    changed = {f"{architecture}.{key.replace('__', '.')}": value for key, value in changes.items()}
    return spec_from_gguf({**renamed, "general.architecture": architecture, **changed}, SHAPES)


# -- config.json


def test_llama() -> None:
    spec = hf(rope_theta=5e5, eos_token_id=[7, 8, 7], bos_token_id=1, torch_dtype="float16")
    assert (spec.family, spec.head_dim, spec.num_kv_heads, spec.rms_norm_eps) == ("llama", 16, 2, 1e-5)
    assert spec.layer_kinds == ("full", "full") and spec.sliding_window == 0
    assert spec.rope_full.theta == 5e5 and spec.attention_scale == 0.25
    assert (spec.eos_token_ids, spec.bos_token_id, spec.stored_dtype) == ((7, 8), 1, "float16")
    assert not spec.tie_word_embeddings and not spec.attention_bias and not spec.qk_norm and spec.embedding_scale == 1.0


def test_num_parameters_of_a_published_model() -> None:
    """Qwen3 0.6B: 596,049,920 weights, 751,632,384 if the embeddings were counted twice."""
    spec = spec_from_hf_config(
        {
            "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
            "max_position_embeddings": 40960, "tie_word_embeddings": True,
        }
    )  # fmt: skip
    assert spec.num_parameters == 596_049_920


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("type_key", ["rope_type", "type"])
def test_rope_of_old_and_new_configs(key: str, type_key: str) -> None:
    spec = hf(rope_theta=1e6, **{key: {type_key: "llama3", **LLAMA3_ROPE}})
    rope = spec.rope_full
    assert (rope.scaling, rope.theta, rope.factor, rope.original_max_position) == ("llama3", 1e6, 8.0, 32)


def test_rope_theta_inside_rope_parameters() -> None:
    assert hf(rope_parameters={"rope_type": "default", "rope_theta": 123.0}).rope_full.theta == 123.0


def test_gemma3_defaults_and_pattern() -> None:
    base = {k: v for k, v in LLAMA.items() if k not in ("vocab_size", "max_position_embeddings", "num_attention_heads")}
    config = {**base, "model_type": "gemma3_text", "num_hidden_layers": 7, "num_attention_heads": 4, "head_dim": 32}
    spec = spec_from_hf_config({**config, "sliding_window_pattern": 3, "sliding_window": 512, "rope_local_base_freq": 9e3})
    assert [kind[0] for kind in spec.layer_kinds] == ["s", "s", "f", "s", "s", "f", "s"]
    assert spec.rope_full.theta == 1e6 and spec.rope_sliding.theta == 9e3
    assert (spec.embedding_scale, spec.attention_scale) == (8.0, 256**-0.5)
    assert spec.tie_word_embeddings and spec.norm_plus_one and spec.sandwich_norms and spec.qk_norm
    assert (spec.vocab_size, spec.activation) == (262_208, "gelu_tanh")
    assert spec_from_hf_config(config).layer_kinds.count("full") == 1


def test_linear_scaling_of_gemma3_is_for_full_attention_only() -> None:
    spec = hf(model_type="gemma3_text", rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert spec.rope_full.factor == 8.0 and spec.rope_sliding.scaling == "none"


def test_multimodal_gemma3_takes_ids_and_dtype_from_outside() -> None:
    text = {**LLAMA, "model_type": "gemma3_text"}
    spec = spec_from_hf_config({"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106], "dtype": "bfloat16"})
    assert spec.eos_token_ids == (1, 106) and spec.stored_dtype == "bfloat16"


def test_a_multimodal_gemma3_names_only_what_differs_from_the_defaults() -> None:
    """Wrappers store their text part without what equals the default: Gemma 3 4B's config.json names five values."""
    from transformers import Gemma3TextConfig

    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    spec, theirs = spec_from_hf_config({"model_type": "gemma3", "text_config": text}), Gemma3TextConfig(**text)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (8, 4, 256)
    assert [f"{kind}_attention" for kind in spec.layer_kinds] == theirs.layer_types
    assert (spec.rope_full.factor, spec.rope_sliding.factor, spec.sliding_window) == (8.0, 1.0, 1024)
    assert spec.num_parameters == 3_880_263_168
    bare, theirs = spec_from_hf_config({"model_type": "gemma3_text"}), Gemma3TextConfig()
    assert (bare.hidden_size, bare.intermediate_size) == (theirs.hidden_size, theirs.intermediate_size)
    assert (bare.num_layers, bare.num_heads, bare.num_kv_heads) == (26, theirs.num_attention_heads, theirs.num_key_value_heads)
    assert (bare.head_dim, bare.vocab_size, bare.max_position) == (256, theirs.vocab_size, theirs.max_position_embeddings)


def test_absent_kv_heads_are_the_default_of_the_family() -> None:
    """As `transformers` reads them; Llama's null, and that of older configs of the others, is as many as query heads."""
    from transformers import AutoConfig

    sizes = {**{k: v for k, v in LLAMA.items() if k not in ("model_type", "num_key_value_heads")}, "num_attention_heads": 32}
    for family in ("llama", "mistral", "qwen2", "qwen3", "gemma3_text"):
        theirs = AutoConfig.for_model(family, **sizes)
        ours = spec_from_hf_config({**sizes, "model_type": family})
        assert (ours.num_kv_heads, ours.max_position) == (theirs.num_key_value_heads, 128), family
        assert spec_from_hf_config({**sizes, "model_type": family, "num_key_value_heads": None}).num_kv_heads == 32


def test_defaults_are_those_of_transformers() -> None:
    """Checked against the config classes themselves, so that a short config.json means the same to both."""
    from transformers import MistralConfig, Qwen2Config, Qwen3Config

    sizes = {k: v for k, v in LLAMA.items() if k not in ("model_type", "rms_norm_eps")}
    mistral, theirs = hf(model_type="mistral", rms_norm_eps="absent"), MistralConfig(**sizes)
    assert (mistral.sliding_window, mistral.rms_norm_eps) == (theirs.sliding_window, theirs.rms_norm_eps)
    assert mistral.layer_kinds == ("sliding", "sliding") and hf(model_type="mistral", sliding_window=None).sliding_window == 0
    layers = {"num_hidden_layers": 30, "use_sliding_window": True}
    qwen2, theirs = hf(model_type="qwen2", **layers), Qwen2Config(**{**sizes, **layers})
    assert qwen2.sliding_window == theirs.sliding_window
    assert [f"{kind}_attention" for kind in qwen2.layer_kinds] == theirs.layer_types
    qwen3, theirs = hf(model_type="qwen3"), Qwen3Config(**sizes)
    assert (qwen3.head_dim, qwen3.tie_word_embeddings) == (theirs.head_dim, theirs.tie_word_embeddings)


@pytest.mark.parametrize(
    ("changes", "error", "names"),
    [
        ({"model_type": "mamba"}, UnsupportedModel, "'mamba'"),
        ({"model_type": "absent"}, UnsupportedModel, "'missing'"),
        ({"quantization_config": {"quant_method": "awq"}}, UnsupportedModel, "'awq'"),
        ({"quantization_config": "gptq"}, UnsupportedModel, "gptq"),
        ({"hidden_act": "relu"}, UnsupportedModel, "'relu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, UnsupportedModel, "'yarn'"),
        ({"partial_rotary_factor": 0.5}, UnsupportedModel, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, UnsupportedModel, "partial_rotary_factor"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, UnsupportedModel, "use_bidirectional_attention"),
        ({"hidden_size": "absent"}, BrokenModel, "'hidden_size'"),
        ({"hidden_size": -1}, BrokenModel, "'hidden_size'"),
        ({"vocab_size": True}, BrokenModel, "'vocab_size'"),
        ({"num_hidden_layers": 2.5}, BrokenModel, "'num_hidden_layers'"),
        ({"num_hidden_layers": 10**8}, BrokenModel, "'num_hidden_layers'"),
        ({"num_key_value_heads": 3}, BrokenModel, "4 attention heads"),
        ({"hidden_size": 2, "head_dim": None}, BrokenModel, "'head_dim'"),
        ({"head_dim": 33}, BrokenModel, "'head_dim'"),
        ({"rms_norm_eps": "small"}, BrokenModel, "'rms_norm_eps'"),
        ({"rope_theta": "big"}, BrokenModel, "'rope_theta'"),
        ({"rope_scaling": {"rope_type": "linear"}}, BrokenModel, "'factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, BrokenModel, "'low_freq_factor'"),
        ({"rope_scaling": "linear"}, BrokenModel, "'rope_scaling'"),
        ({"model_type": "gemma3_text", "layer_types": ["full_attention"]}, BrokenModel, "layer_types"),
        ({"model_type": "gemma3_text", "layer_types": ["full_attention", "chunked"]}, UnsupportedModel, "'chunked'"),
        ({"model_type": "mistral", "sliding_window": "wide"}, BrokenModel, "'sliding_window'"),
        ({"eos_token_id": "</s>"}, BrokenModel, "'eos_token_id'"),
        ({"text_config": 3, "model_type": "gemma3"}, BrokenModel, "'text_config'"),
    ],
)
def test_what_is_refused_is_named(changes: dict[str, Any], error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names):
        hf(**changes)


def test_quantisation_of_a_multimodal_wrapper_is_seen() -> None:
    config = {"model_type": "gemma3", "text_config": {**LLAMA, "model_type": "gemma3_text"}}
    with pytest.raises(UnsupportedModel, match="'fp8'"):
        spec_from_hf_config({**config, "quantization_config": {"quant_method": "fp8"}})


KEYS = (
    *LLAMA, "head_dim", "sliding_window", "layer_types", "rope_scaling", "rope_parameters", "rope_theta", "eos_token_id",
    "bos_token_id", "quantization_config", "use_sliding_window", "max_window_layers", "hidden_act", "query_pre_attn_scalar",
    "final_logit_softcapping", "sliding_window_pattern", "rope_local_base_freq", "text_config", "torch_dtype",
)  # fmt: skip
ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**12) | st.floats() | st.sampled_from(["", "linear", "llama3", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["rope_type", "factor", "rope_theta", "full_attention"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gemma3"]), st.dictionaries(st.sampled_from(KEYS), ODD)
)
def test_any_config_gives_a_spec_or_a_model_error(model_type: str, changes: dict[str, Any]) -> None:
    try:
        spec = hf(**{"model_type": model_type, **changes})
    except ModelError as error:
        assert str(error)
    else:
        assert spec.num_parameters > 0 and len(spec.layer_kinds) == spec.num_layers


# -- GGUF


def test_gguf_llama() -> None:
    spec = gguf(rope__freq_base=5e5)
    assert (spec.family, spec.head_dim, spec.num_kv_heads, spec.vocab_size, spec.rms_norm_eps) == ("llama", 16, 2, 100, 1e-5)
    assert spec.rope_full.theta == 5e5 and not spec.tie_word_embeddings and spec.layer_kinds == ("full", "full")


def test_gguf_gemma3() -> None:
    changes = {"block_count": 7, "attention__sliding_window": 512, "attention__key_length": 32, "rope__scaling__type": "linear"}
    spec = gguf("gemma3", **changes, rope__scaling__factor=8.0)
    assert spec.layer_kinds.count("full") == 1 and spec.sliding_window == 512 and not spec.attention_bias
    assert (spec.rope_full.theta, spec.rope_full.factor) == (1e6, 8.0)
    assert (spec.rope_sliding.theta, spec.rope_sliding.scaling) == (1e4, "none")
    assert spec.attention_scale == 32**-0.5


def test_gguf_gemma3_27b_scales_by_hidden_over_heads() -> None:
    """Its query_pre_attn_scalar is 168 where the heads have 128; the header does not say so."""
    spec = gguf("gemma3", block_count=62, embedding_length=5376, attention__head_count=32, attention__key_length=128)
    assert spec.attention_scale == 168**-0.5


def test_gguf_head_counts_may_be_the_same_for_every_layer() -> None:
    assert gguf(attention__head_count_kv=np.array([2, 2])).num_kv_heads == 2


@pytest.mark.parametrize(
    ("changes", "error", "names"),
    [
        ({"embedding_length": None}, BrokenModel, "'llama.embedding_length'"),
        ({"block_count": "two"}, BrokenModel, "'llama.block_count'"),
        ({"attention.head_count": 0}, BrokenModel, "'llama.attention.head_count'"),
        ({"attention.head_count_kv": np.array([2, 1])}, UnsupportedModel, "'llama.attention.head_count_kv'"),
        ({"attention.head_count_kv": [2, 1]}, UnsupportedModel, "'llama.attention.head_count_kv'"),
        ({"expert_count": 8}, UnsupportedModel, "'llama.expert_count'"),
        ({"rope.dimension_count": 8}, UnsupportedModel, "'llama.rope.dimension_count'"),
        ({"attention.value_length": 8}, UnsupportedModel, "'llama.attention.value_length'"),
        ({"rope.scaling.type": "yarn"}, UnsupportedModel, "'yarn'"),
        ({"rope.scaling.type": "linear"}, BrokenModel, "GGUF header.*'factor'"),
        ({"rope.freq_base": "x"}, BrokenModel, "GGUF header: 'rope_theta'"),
    ],
)
def test_what_is_refused_in_gguf_is_named(changes: dict[str, Any], error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names):
        gguf(**changes)


def test_gguf_of_another_architecture_or_without_embeddings() -> None:
    with pytest.raises(UnsupportedModel, match="'phi3'"):
        gguf("phi3")
    with pytest.raises(BrokenModel, match=r"token_embd\.weight"):
        spec_from_gguf(GGUF, {})


def test_rope_divisors_must_fit_the_heads() -> None:
    assert spec_from_gguf(GGUF, SHAPES, [1.0] * 8).rope_full.divisors == (1.0,) * 8
    with pytest.raises(BrokenModel, match=r"rope_freqs\.weight"):
        spec_from_gguf(GGUF, SHAPES, [1.0] * 7)


@pytest.mark.parametrize("epsilon", [0, -1e-6])
def test_a_norm_epsilon_that_no_norm_can_use_is_refused(epsilon: float) -> None:
    with pytest.raises(BrokenModel, match="rms_norm_eps"):
        spec_from_hf_config({**LLAMA, "rms_norm_eps": epsilon})
