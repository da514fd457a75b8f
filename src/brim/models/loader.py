"""Weights from files into a model, tensor by tensor. Owns streaming, checking and dummy weights.

At most one chunk of a tensor is held beside the model: read, convert or dequantise, store, release the file's pages. All
chunks go through one buffer, because freed ones would stay in the allocator's heap. So the host's peak stays within twice
CHUNK_BYTES (the buffer, and a copy of it where heads are permuted) and the file pages of one chunk of the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from brim.config.model_spec import ModelSpec
from brim.errors import BrokenModel, UnsupportedModel
from brim.formats.ggml_type import GGMLType
from brim.formats.gguf import GGUFTensor
from brim.formats.safetensors_file import SafetensorsTensor
from brim.formats.weight_file import TensorInfo, WeightSource
from brim.kernels.base import Kernels
from brim.kernels.dequantize import NativeDequantizer, dequantize, row_bytes
from brim.layers.weights import KeptBlocks
from brim.models.decoder import DecoderModel
from brim.models.slots import Slot, build_slots, slot_name
from brim.units import round_up

CHUNK_BYTES = 8 << 20
_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
Progress = Callable[[str, float | None], None]


def load_weights(model: DecoderModel, source: WeightSource, kernels: Kernels, on_progress: Progress) -> None:
    """Fill every slot of the model exactly once from `source`; closes nothing.

    Raises BrokenModel naming missing, unexpected, repeated or wrong-shaped tensors; UnsupportedModel for storage types.
    """
    names = list(source.names())
    is_gguf = bool(names) and isinstance(source.info(names[0]), GGUFTensor)
    slots = build_slots(model.weights, model.spec, is_gguf=is_gguf)
    targets = _match(names, slots, source, model, is_gguf=is_gguf)
    total = sum(source.info(name).num_bytes for name, _ in targets) or 1
    done = 0
    native = kernels if hasattr(kernels, "dequantize_rows") else None
    staging = _Staging()
    for name, slot in targets:
        info = source.info(name)
        kept = slot.matrix is not None and slot.matrix.block_type_of(slot.first_row)
        for first_row, rows in _row_chunks(source, info, slot, native, staging):
            if kept and slot.matrix is not None:
                slot.matrix.load_blocks(slot.first_row + first_row, rows)
            else:
                _store(slot, first_row, rows)
            source.release(name)
        done += info.num_bytes
        on_progress(name, done / total)


def stored_blocks(source: WeightSource, spec: ModelSpec, block_types: frozenset[GGMLType]) -> KeptBlocks:
    """The matrices of a GGUF file that are stored in one of `block_types`: those that may stay as they are."""
    found: dict[str, GGMLType] = {}
    for name in source.names():
        info = source.info(name)
        if isinstance(info, GGUFTensor) and len(info.shape) == 2 and info.ggml_type in block_types:
            found[slot_name(name, spec, is_gguf=True) or ""] = info.ggml_type
    return found


def fill_dummy(model: DecoderModel, on_progress: Progress, seed: int = 0) -> None:
    """Random weights of standard deviation 0.02 (norms 1, biases 0): one random chunk, reused from shifting offsets."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(1 << 21, generator=generator).mul_(0.02).to(model.device, model.dtype)
    slots = build_slots(model.weights, model.spec, is_gguf=True)
    for index, slot in enumerate(slots.values()):
        if slot.vector is not None:
            slot.vector.fill_(1.0 if "norm" in slot.name else 0.0)
            continue
        chunk_rows = max(1, min(slot.rows, (len(pool) // 2) // slot.cols))
        for first_row in range(0, slot.rows, chunk_rows):
            count = min(chunk_rows, slot.rows - first_row)
            start = (index * 7919 + first_row * 31) % (len(pool) - count * slot.cols + 1)
            _store(slot, first_row, pool[start : start + count * slot.cols].view(count, slot.cols))
        on_progress(slot.name, (index + 1) / len(slots))


class _Staging:
    """The one buffer through which every chunk goes; it grows to the largest."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        """[rows, cols] of what was there before, valid until the next call."""
        num_bytes = rows * cols * dtype.itemsize
        if self._buffer.numel() < num_bytes:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8)
        return self._buffer[:num_bytes].view(dtype).view(rows, cols)


def _match(
    names: list[str], slots: dict[str, Slot], source: WeightSource, model: DecoderModel, *, is_gguf: bool
) -> list[tuple[str, Slot]]:
    """Pairs of stored name and slot, every slot once."""
    found: dict[str, tuple[str, Slot]] = {}
    for name in names:
        ours = slot_name(name, model.spec, is_gguf=is_gguf)
        if ours is None:
            continue
        slot = slots.get(ours)
        if slot is None:
            raise BrokenModel(f"Tensor '{name}' does not belong to a {model.spec.family} model of this config; check the files.")
        if ours in found:
            raise BrokenModel(f"Tensors '{found[ours][0]}' and '{name}' both hold {ours}; download the model again.")
        shape = tuple(source.info(name).shape)
        if shape != slot.shape:
            raise BrokenModel(f"Tensor '{name}' has shape {list(shape)}, the config says {list(slot.shape)}; check the files.")
        found[ours] = (name, slot)
    missing = sorted(set(slots) - set(found))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise BrokenModel(f"The files lack {', '.join(missing[:3])}{more}; download the model again.")
    return list(found.values())


def _row_chunks(
    source: WeightSource, info: TensorInfo, slot: Slot, native: NativeDequantizer | None, staging: _Staging
) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows [n, cols]) over one stored tensor, heads of permuted tensors kept whole."""
    raw = np.frombuffer(source.tensor_bytes(info.name), dtype=np.uint8)
    rows, cols = (slot.rows, slot.cols) if slot.matrix is not None else (1, slot.rows)
    unit = rows // slot.permuted_heads if slot.permuted_heads and slot.matrix is not None else 1
    step = min(rows, round_up(max(1, CHUNK_BYTES // (4 * cols)), unit))
    if isinstance(info, GGUFTensor) and slot.matrix is not None and slot.matrix.block_type_of(slot.first_row) is info.ggml_type:
        read = _bytes_reader(row_bytes(info.ggml_type, cols), torch.uint8, staging)
    elif isinstance(info, GGUFTensor):
        read = _gguf_reader(info, cols, native, staging)
    else:
        read = _plain_reader(info, cols, staging)
    for first_row in range(0, rows, step):
        count = min(step, rows - first_row)
        chunk = read(raw, first_row, count)
        yield first_row, _unpermute(chunk, slot, count) if slot.permuted_heads else chunk


def _gguf_reader(
    info: GGUFTensor, cols: int, native: NativeDequantizer | None, staging: _Staging
) -> Callable[[np.ndarray, int, int], Tensor]:
    kind = int(info.ggml_type)
    stride = row_bytes(kind, cols)

    def read(raw: np.ndarray, first_row: int, count: int) -> Tensor:
        out = staging.take(count, cols, torch.float32)
        dequantize(raw[first_row * stride : (first_row + count) * stride], kind, count, cols, out, native)
        return out

    return read


def _plain_reader(info: TensorInfo, cols: int, staging: _Staging) -> Callable[[np.ndarray, int, int], Tensor]:
    assert isinstance(info, SafetensorsTensor)
    dtype = _TORCH_DTYPES.get(info.dtype)
    if dtype is None:
        raise UnsupportedModel(f"Tensor '{info.name}' is stored as {info.dtype}; Brim reads {', '.join(_TORCH_DTYPES)}.")
    return _bytes_reader(cols, dtype, staging)


def _bytes_reader(cols: int, dtype: torch.dtype, staging: _Staging) -> Callable[[np.ndarray, int, int], Tensor]:
    """Rows as they are stored."""
    stride = cols * dtype.itemsize

    def read(raw: np.ndarray, first_row: int, count: int) -> Tensor:
        out = staging.take(count, cols, dtype)
        out.view(torch.uint8).view(-1).numpy()[:] = raw[first_row * stride : (first_row + count) * stride]
        return out

    return read


def _unpermute(chunk: Tensor, slot: Slot, count: int) -> Tensor:
    """Undo GGUF's interleaving of rotary halves: stored row 2j + h of a head is row h * D/2 + j."""
    head_dim = slot.rows // slot.permuted_heads
    if slot.vector is not None:
        return chunk.view(-1, head_dim // 2, 2).transpose(1, 2).reshape(1, -1)
    return chunk.view(count // head_dim, head_dim // 2, 2, -1).transpose(1, 2).reshape(count, -1)


def _store(slot: Slot, first_row: int, rows: Tensor) -> None:
    if slot.matrix is not None:
        slot.matrix.load_rows(slot.first_row + first_row, rows)
    elif slot.vector is not None:
        slot.vector.copy_(rows[0])
        if slot.plus_one:
            slot.vector.add_(1.0)
