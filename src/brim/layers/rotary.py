"""Rotary tables. Owns cos and sin of every position for one RopeSpec; the rotation itself is a kernel's.

Source: Su et al. 2021 (RoFormer), rotate-half form; llama3 scaling as published with Llama 3.1's config.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from brim.config.model_spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """[head_dim / 2] float32: theta ** (-2i / head_dim), scaled as the spec says."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponent)
    if rope.divisors:
        frequencies = frequencies / torch.tensor(rope.divisors, dtype=torch.float32)
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "llama3":
        wavelength = 2 * math.pi / frequencies
        low = rope.original_max_position / rope.low_freq_factor
        high = rope.original_max_position / rope.high_freq_factor
        scaled = torch.where(wavelength > low, frequencies / rope.factor, frequencies)
        share = rope.original_max_position / wavelength - rope.low_freq_factor
        smooth = share / (rope.high_freq_factor - rope.low_freq_factor)
        mixed = (1 - smooth) * scaled / rope.factor + smooth * scaled
        medium = ~(wavelength < high) & ~(wavelength > low)
        return torch.where(medium, mixed, scaled)
    return frequencies


def cos_sin_table(rope: RopeSpec, head_dim: int, max_position: int, device: torch.device | str = "cpu") -> Tensor:
    """[max_position, head_dim] float32: the first half cosines, the last half sines. Filled in chunks: no large temporary."""
    frequencies = inverse_frequencies(rope, head_dim)
    table = torch.empty(max_position, head_dim, dtype=torch.float32)
    half = head_dim // 2
    for start in range(0, max_position, 4096):
        stop = min(max_position, start + 4096)
        angles = torch.outer(torch.arange(start, stop, dtype=torch.float32), frequencies)
        torch.cos(angles, out=table[start:stop, :half])
        torch.sin(angles, out=table[start:stop, half:])
    return table.to(device)
