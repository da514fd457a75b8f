"""The largest step the engine may ever form. Owns the numbers that scheduler, table and worker agree on; torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from brim.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Decided once, before anything is built from it. pipeline_depth: steps planned before the first one's result is read."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    enable_chunked_prefill: bool = True
    pipeline_depth: int = 1

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "pipeline_depth"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs {self.max_num_seqs}: "
                "a step must hold one token of every running sequence. Raise the first or lower the second."
            )
