"""The memory Triton kernels work in. Owns the limits it is sized from, its exact bytes and the buffers themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from brim.config.model_spec import ModelSpec
from brim.kernels.triton.tuning import CHUNK_ELEMENTS, DECODE_PROGRAMS_PER_CORE, SAMPLE_CHUNK, SAMPLE_PART
from brim.units import ceil_div, round_up

_MATRIX_ALIGNMENT_BYTES = 256


@dataclass(frozen=True, slots=True)
class KernelLimits:
    """The most a model and its scheduler will ask of the kernels. Scratch memory is sized from it and never grows.

    max_num_seqs: sequences in a step, which is also the most rows of logits in one call; heads as in the model's config.
    """

    max_num_seqs: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def of(cls, spec: ModelSpec, max_num_seqs: int) -> KernelLimits:
        """For steps of a model."""
        return cls(max_num_seqs, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size)

    @property
    def chunks(self) -> int:
        """Pieces a row of logits is reduced in."""
        return ceil_div(self.vocab_size, SAMPLE_CHUNK)

    def decode_parts(self, num_cores: int) -> int:
        """Equal shares the decode work of one KV head is cut into: all heads together fill the chip."""
        return max(1, num_cores * DECODE_PROGRAMS_PER_CORE // self.num_kv_heads)

    def buffer_shapes(self, num_cores: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Every scratch buffer: name -> (shape, dtype). Kernels that cut their work evenly share sums, stats and part_arrivals:
        one runs after the other, and each leaves the arrivals at zero.

        Example: 132 cores, 32 heads over 8 KV heads of 128: sums hold two slots of 128 x 128 floats for chunk attention on each
        core, 17,301,504 bytes.
        """
        slots, group = self.decode_parts(num_cores) * 2 * self.num_kv_heads, self.num_heads // self.num_kv_heads
        chunk_slots = max(num_cores, self.num_kv_heads) * 2
        rows = (self.max_num_seqs, self.chunks)
        parts = (self.max_num_seqs, self.chunks * (SAMPLE_CHUNK // SAMPLE_PART))
        return {
            "sums": ((max(slots * group * self.head_dim, chunk_slots * CHUNK_ELEMENTS),), torch.float32),
            "stats": ((max(slots * 2 * group, chunk_slots * 2 * 128),), torch.float32),
            "arrivals": ((self.max_num_seqs, self.num_kv_heads), torch.int32),
            "part_arrivals": ((4 * max(num_cores, self.num_kv_heads),), torch.int32),
            "best_value": (rows, torch.float32),
            "part_best": (parts, torch.float32),
            "active_parts": (parts, torch.int32),
            "best_id": (rows, torch.int32),
            "chunk_sum": (rows, torch.float32),
            "threshold": ((self.max_num_seqs,), torch.int32),
            "counts": ((self.vocab_size,), torch.int32),
        }

    def scratch_bytes(self, num_cores: int) -> int:
        """Bytes of all scratch buffers."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.buffer_shapes(num_cores).values())


def matrix_num_bytes(out_features: int, in_features: int, dtype: torch.dtype) -> int:
    """Bytes of a weight matrix: plain, the next one aligned."""
    return round_up(out_features * in_features * dtype.itemsize, _MATRIX_ALIGNMENT_BYTES)


class Scratch:
    """The buffers of `KernelLimits.buffer_shapes`, zeroed. Kernels leave `arrivals` and `counts` zero behind them."""

    def __init__(self, limits: KernelLimits, num_cores: int, device: torch.device) -> None:
        made = {
            name: torch.zeros(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in limits.buffer_shapes(num_cores).items()
        }
        self.sums, self.stats, self.arrivals = made["sums"], made["stats"], made["arrivals"]
        self.best_value, self.best_id, self.chunk_sum = made["best_value"], made["best_id"], made["chunk_sum"]
        self.part_best, self.active_parts = made["part_best"], made["active_parts"]
        self.threshold, self.counts = made["threshold"], made["counts"]
        self.part_arrivals = made["part_arrivals"]
        self.num_bytes = sum(buffer.nbytes for buffer in made.values())
