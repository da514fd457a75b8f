"""GGUF blocks to floats. Owns the block types Brim reads and the plain version; the CPU backend has the fast one.

Source of the layouts: ggml's block structures (ggml-common.h), restated here and in csrc/dequantize.c. Both versions give the
same bits as `gguf.quants.dequantize`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brim.errors import UnsupportedModel

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


class NativeDequantizer(Protocol):
    """A backend that decodes blocks itself: `CpuKernels`."""

    def dequantize_rows(self, address: int, ggml_type: int, rows: int, cols: int, out: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class BlockType:
    """One ggml type: `block_bytes` hold `block_elements` values; decode maps [n, block_bytes] to [n, block_elements]."""

    name: str
    block_elements: int
    block_bytes: int
    decode: Callable[[Bytes], Floats]


def dequantize(
    raw: memoryview | Bytes, ggml_type: int, rows: int, cols: int, out: Tensor, native: NativeDequantizer | None = None
) -> None:
    """out [rows, cols] (float32, bfloat16 or float16, on the host, stride(1) == 1) = the rows stored in raw.

    raw: contiguous bytes, at least rows * row_bytes(ggml_type, cols). native: a backend to do it fast.
    Raises UnsupportedModel for a type Brim does not read or rows that are not whole blocks.
    """
    needed = rows * row_bytes(ggml_type, cols)
    data = np.frombuffer(raw, dtype=np.uint8) if isinstance(raw, memoryview) else raw.reshape(-1).view(np.uint8)
    assert data.size >= needed and tuple(out.shape) == (rows, cols) and out.stride(1) == 1
    if native is not None:
        native.dequantize_rows(data.ctypes.data, ggml_type, rows, cols, out)
        return
    block = BLOCK_TYPES[ggml_type]
    step = max(1, (1 << 22) // cols)  # keeps the temporaries to tens of MiB
    for first in range(0, rows, step):
        last = min(rows, first + step)
        part = data[first * (needed // rows) : last * (needed // rows)].reshape(-1, block.block_bytes)
        out[first:last] = torch.from_numpy(block.decode(part).reshape(last - first, cols))


def row_bytes(ggml_type: int, cols: int) -> int:
    """Bytes of one row of cols values. Raises UnsupportedModel."""
    block = BLOCK_TYPES.get(ggml_type)
    if block is None:
        known = ", ".join(known.name for known in BLOCK_TYPES.values())
        raise UnsupportedModel(f"GGUF tensor type {ggml_type} is not supported; supported: {known}.")
    # the unquantised types are decoded natively 16 at a time
    if cols % (16 if block.block_elements == 1 else block.block_elements):
        raise UnsupportedModel(f"GGUF rows of {cols} values are not whole {block.name} blocks.")
    return cols // block.block_elements * block.block_bytes


def _half(blocks: Bytes, first: int) -> Floats:
    """The float16 at byte `first` of each block, [n, 1] float32."""
    half: Floats = np.ascontiguousarray(blocks[:, first : first + 2]).view(np.float16).astype(np.float32)
    return half


def _nibbles(packed: Bytes) -> Bytes:
    """[n, b] -> [n, 2b]: all low halves, then all high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(blocks: Bytes, first: int) -> Bytes:
    """32 bits at byte `first` of each block as [n, 32] of 0 or 16."""
    bits: Bytes = np.unpackbits(blocks[:, first : first + 4], axis=1, bitorder="little") << np.uint8(4)
    return bits


def _f32(blocks: Bytes) -> Floats:
    values: Floats = np.ascontiguousarray(blocks).view(np.float32)
    return values.copy()  # not a view of the file, which torch would warn of


def _f16(blocks: Bytes) -> Floats:
    return _half(blocks, 0)


def _bf16(blocks: Bytes) -> Floats:
    values: Floats = (np.ascontiguousarray(blocks).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values


def _q8_0(blocks: Bytes) -> Floats:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _half(blocks, 0)


def _q4_0(blocks: Bytes) -> Floats:
    return (_nibbles(blocks[:, 2:]).astype(np.float32) - np.float32(8)) * _half(blocks, 0)


def _q4_1(blocks: Bytes) -> Floats:
    return _nibbles(blocks[:, 4:]).astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    values = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return (values.astype(np.float32) - np.float32(16)) * _half(blocks, 0)


def _q5_1(blocks: Bytes) -> Floats:
    values = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return values.astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def _scales_k(packed: Bytes) -> tuple[Floats, Floats]:
    """[n, 12] -> scales and minima [n, 8]: four of 6 bits in bytes 0-3 and 4-7, four over bytes 8-11 and the top bits."""
    low, high, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = np.concatenate([low & 63, (rest & 15) | (low >> 6) << 4], axis=1)
    minimum = np.concatenate([high & 63, rest >> 4 | (high >> 6) << 4], axis=1)
    return scale.astype(np.float32), minimum.astype(np.float32)


def _affine_k(blocks: Bytes, values: Bytes) -> Floats:
    """values [n, 8, 32] scaled per sub-block as Q4_K and Q5_K do."""
    scale, minimum = _scales_k(blocks[:, 4:16])
    scaled = (_half(blocks, 0) * scale)[:, :, None] * values.astype(np.float32)
    return (scaled - (_half(blocks, 2) * minimum)[:, :, None]).reshape(-1, 256)


def _nibbles_k(packed: Bytes) -> Bytes:
    """[n, 128] -> [n, 8, 32]: each 32 bytes are two sub-blocks, low halves first."""
    return _nibbles(packed.reshape(-1, 32)).reshape(-1, 8, 32)


def _q4_k(blocks: Bytes) -> Floats:
    return _affine_k(blocks, _nibbles_k(blocks[:, 16:]))


def _q5_k(blocks: Bytes) -> Floats:
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    bits: Bytes = (blocks[:, None, 16:48] >> shifts & np.uint8(1)) << np.uint8(4)
    return _affine_k(blocks, _nibbles_k(blocks[:, 48:]) | bits)


def _q6_k(blocks: Bytes) -> Floats:
    low = _nibbles(blocks[:, :128].reshape(-1, 64)).reshape(-1, 256)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[None, :, None]
    high = (blocks[:, 128:192].reshape(-1, 1, 32) >> shifts & 3).reshape(-1, 256) << 4
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    values = (low | high).astype(np.float32) - np.float32(32)
    return (scale[:, :, None] * values.reshape(-1, 16, 16)).reshape(-1, 256)


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4, _f32),
    1: BlockType("F16", 1, 2, _f16),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
    30: BlockType("BF16", 1, 2, _bf16),
}
