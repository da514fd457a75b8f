"""Whether a start keeps the weights of a quantised file as they are, or makes floats of them. Owns the choice and its reason."""

from __future__ import annotations

from dataclasses import dataclass, field

from brim.config.model_source import ModelSource
from brim.config.schema import ModelConfig
from brim.errors import ConfigError
from brim.formats.gguf import GGUFTensor
from brim.kernels.planned import KernelFacts
from brim.layers.weights import NO_BLOCKS, KeptBlocks
from brim.models.loader import stored_blocks


@dataclass(frozen=True, slots=True)
class WeightChoice:
    """kept: the matrices that stay blocks. text: what weights are and why, for reports."""

    kept: KeptBlocks = field(default_factory=lambda: NO_BLOCKS)
    text: str = "in the model's dtype"


def choose_weights(config: ModelConfig, kernels: KernelFacts, source: ModelSource) -> WeightChoice:
    """What --quantization and --dtype ask for, as far as file and kernels can.

    auto keeps what the kernels multiply as it is, unless a dtype was asked for. Raises ConfigError where gguf was asked for and
    nothing can be kept.
    """
    stored = _stored_types(source)
    wanted = config.quantization == "gguf"
    if not stored:
        return _without("the weights are not quantised", wanted)
    if config.quantization == "none":
        return _without("--quantization none asks for it", wanted)
    if not wanted and config.dtype != "auto":
        return _without(f"--dtype {config.dtype} asks for it", wanted)
    assert source.weights is not None
    kept = stored_blocks(source.weights, source.spec, kernels.block_types)
    if not kept:
        return _without(f"{kernels.name} kernels multiply no {', '.join(stored)}", wanted)
    names = sorted({kind.name for kind in kept.values()})
    return WeightChoice(kept, f"as stored: {', '.join(names)}")


def _without(reason: str, wanted: bool) -> WeightChoice:
    if wanted:
        raise ConfigError(f"--quantization gguf cannot be done ({reason}); drop it.")
    return WeightChoice(NO_BLOCKS, f"in the model's dtype: {reason}")


def _stored_types(source: ModelSource) -> list[str]:
    """Names of the quantised types in the file."""
    infos = [] if source.weights is None else [source.weights.info(name) for name in source.weights.names()]
    kinds = {info.ggml_type for info in infos if isinstance(info, GGUFTensor)}
    return sorted(kind.name for kind in kinds if kind.block_elements > 1)
