"""Sizes of the models whose kernels are timed. Owns the figures of their config.json files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense decoder."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """name -> (out_features, in_features) of one layer."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        return {
            "qkv": (qkv, self.hidden),
            "o": (self.hidden, self.heads * self.head_dim),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


GEMMA_3_270M = ModelShape(640, 2048, 4, 1, 256, 262144, 18)
LLAMA_3_1_8B = ModelShape(4096, 14336, 32, 8, 128, 128256, 32)
QWEN3_0_6B = ModelShape(1024, 3072, 16, 8, 128, 151936, 28)
