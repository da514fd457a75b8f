"""A model as one of several devices holds it. Owns the split of shapes over ranks, for plans; no such start exists yet."""

from __future__ import annotations

from dataclasses import replace

from brim.config.model_source import ModelSource
from brim.errors import ConfigError
from brim.units import ceil_div

RANK_COUNTS = (1, 2, 4, 8)


def rank_source(source: ModelSource, count: int) -> ModelSource:
    """What one of `count` ranks holds: its heads, its part of the MLP and of the vocabulary. A KV head that is not there for each
    rank is held by several. Buffers for communication are not part of it: nothing was measured.

    Example: 32 heads over 8 KV heads, 14,336 inner and 128,256 ids on 4 ranks: 8 heads over 2, 3,584 and 32,064.
    Raises ConfigError where heads or the MLP cannot be divided.
    """
    spec = source.spec
    if count == 1:
        return source
    if spec.num_heads % count:
        raise ConfigError(f"{spec.num_heads} attention heads cannot be divided over {count} devices.")
    if spec.num_kv_heads % count and count % spec.num_kv_heads:
        raise ConfigError(f"{spec.num_kv_heads} KV heads can neither be divided nor repeated over {count} devices.")
    if spec.intermediate_size % count:
        raise ConfigError(f"The MLP's {spec.intermediate_size} columns cannot be divided over {count} devices.")
    part = replace(
        spec,
        num_heads=spec.num_heads // count,
        num_kv_heads=max(1, spec.num_kv_heads // count),
        intermediate_size=spec.intermediate_size // count,
        vocab_size=ceil_div(spec.vocab_size, count),
    )
    return replace(source, spec=part)
