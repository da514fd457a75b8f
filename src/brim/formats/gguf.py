"""GGUF files, versions 2 and 3. Owns the header (metadata and tensor list), its validation, and views of tensor data.

Dequantisation belongs to the kernels, meaning of the metadata to `config.model_spec` and `text.tokenizer`.
Layout, from the GGUF specification (ggml, docs/gguf.md), all little-endian:
magic "GGUF", u32 version, u64 tensors, u64 pairs; pairs of (string key, u32 type, value); tensor infos of (string name,
u32 n_dims, u64 dims fastest first, u32 type, u64 offset from the data's start); padding to `general.alignment`; data.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brim.errors import BrokenModel, UnsupportedModel
from brim.formats.ggml_type import GGMLType, ggml_type
from brim.formats.mapped_file import MappedFile, MappedTensors
from brim.units import round_up

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_BOOL = 7
_MAX_ARRAY_DEPTH = 4
_MAX_DIMS = 4
_SCALARS: dict[int, struct.Struct] = {
    number: struct.Struct("<" + code)
    for number, code in {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}.items()
}
_ARRAY_DTYPES = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1", 10: "<u8", 11: "<i8", 12: "<f8"}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor of a GGUF file. `shape` is in torch order; `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLType
    offset: int
    num_bytes: int


class GGUFFile(MappedTensors[GGUFTensor]):
    """An open GGUF file: `metadata` in plain Python values (numeric arrays are numpy) and tensors by name. A WeightSource."""

    advice = "download or convert the file again"

    def __init__(self, mapped: MappedFile, metadata: dict[str, Any], tensors: dict[str, GGUFTensor]) -> None:
        super().__init__(mapped, tensors)
        self.metadata = metadata

    @classmethod
    def open(cls, path: Path | str) -> GGUFFile:
        """Map and check the file; only its header is read.

        Raises ModelNotFound (no such file), BrokenModel (truncated or inconsistent), UnsupportedModel (tensor types, version
        1, big-endian and split files).
        """
        mapped = MappedFile(Path(path))
        try:
            reader = _HeaderReader(mapped)
            return cls(mapped, *reader.read())
        except (struct.error, OverflowError, IndexError) as error:
            mapped.close()
            raise BrokenModel(f"{path} ends inside its header; download the file again.") from error
        except (UnicodeDecodeError, ValueError, MemoryError) as error:
            mapped.close()
            raise BrokenModel(f"{path} has a header that cannot be read ({error}); download the file again.") from error
        except BaseException:
            mapped.close()
            raise


class _HeaderReader:
    """Walks the header once. Running past the end of the file shows as struct.error or in `_check_inside`."""

    def __init__(self, mapped: MappedFile) -> None:
        self._mapped = mapped
        self._data = mapped.data
        self._position = 0

    def read(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        path = self._mapped.path
        if self._data[:4] != _MAGIC:
            raise BrokenModel(f"{path} is not a GGUF file (it does not begin with 'GGUF'); check the path or download it again.")
        self._position = 4
        version = self._scalar(_U32)
        if version not in (2, 3):
            raise UnsupportedModel(
                f"{path} is GGUF version {_version_name(version)}; Brim reads little-endian 2 and 3: convert it."
            )
        num_tensors, num_pairs = self._scalar(_U64), self._scalar(_U64)
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self._string()
            if key in metadata:
                raise BrokenModel(f"{path} has the key '{key}' twice; convert the model again.")
            metadata[key] = self._value(self._scalar(_U32), depth=0)
        split_count = metadata.get("split.count", 0)
        if isinstance(split_count, int) and split_count > 1:
            raise UnsupportedModel(f"{path} is one of {split_count} parts; join them with llama-gguf-split --merge.")
        tensors = self._tensors(num_tensors, self._alignment(metadata))
        self._mapped.release(0, self._position)
        return metadata, tensors

    def _scalar(self, layout: struct.Struct) -> Any:
        (value,) = layout.unpack_from(self._data, self._position)
        self._position += layout.size
        return value

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        """`count` strings. The loop is the start-up cost of a large vocabulary, so it checks the end only once."""
        data, unpack, position = self._data, _U64.unpack_from, self._position
        self._check_inside(position + 8 * count)
        strings: list[str] = []
        append = strings.append
        for _ in range(count):
            start = position + 8
            position = start + unpack(data, position)[0]
            append(str(data[start:position], "utf-8"))
        self._check_inside(position)
        self._position = position
        return strings

    def _value(self, number: int, depth: int) -> Any:
        if number == _STRING:
            return self._string()
        if number == _ARRAY:
            return self._array(depth)
        if number not in _SCALARS:
            raise BrokenModel(f"{self._mapped.path} has a value of unknown type {number}; download or convert the file again.")
        return self._scalar(_SCALARS[number])

    def _array(self, depth: int) -> Any:
        number, count = self._scalar(_U32), self._scalar(_U64)
        if depth >= _MAX_ARRAY_DEPTH:
            raise BrokenModel(f"{self._mapped.path} nests arrays too deep; convert the model again.")
        if number == _STRING:
            return self._strings(count)
        if number == _ARRAY:
            self._check_inside(self._position + 12 * count)
            return [self._array(depth + 1) for _ in range(count)]
        if number not in _ARRAY_DTYPES:
            raise BrokenModel(f"{self._mapped.path} has an array of unknown type {number}; download or convert the file again.")
        dtype = np.dtype(_ARRAY_DTYPES[number])
        start = self._position
        self._check_inside(start + count * dtype.itemsize)
        self._position += count * dtype.itemsize
        values = np.frombuffer(self._data[start : self._position], dtype)
        return values.astype(np.bool_) if number == _BOOL else values

    def _alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment <= 0 or alignment & (alignment - 1):
            raise BrokenModel(f"{self._mapped.path}: general.alignment is {alignment!r}, not a power of two; convert it again.")
        return alignment

    def _tensors(self, count: int, alignment: int) -> dict[str, GGUFTensor]:
        self._check_inside(self._position + 24 * count)
        relative: dict[str, GGUFTensor] = {}
        for _ in range(count):
            tensor = self._tensor()
            if tensor.name in relative:
                raise BrokenModel(f"{self._mapped.path} has the tensor '{tensor.name}' twice; convert the model again.")
            if tensor.offset % alignment:
                raise BrokenModel(f"{self._mapped.path}: tensor '{tensor.name}' is not aligned; convert the model again.")
            relative[tensor.name] = tensor
        data_start = round_up(self._position, alignment)
        tensors: dict[str, GGUFTensor] = {}
        for name, tensor in relative.items():
            offset = data_start + tensor.offset
            if offset + tensor.num_bytes > self._mapped.size_bytes:
                raise BrokenModel(
                    f"{self._mapped.path} is truncated: tensor '{name}' ends at byte {offset + tensor.num_bytes:,} and the file "
                    f"has {self._mapped.size_bytes:,}; download it again."
                )
            tensors[name] = GGUFTensor(name, tensor.shape, tensor.ggml_type, offset, tensor.num_bytes)
        return tensors

    def _tensor(self) -> GGUFTensor:
        """One tensor info, its offset still relative to the data's start."""
        name = self._string()
        num_dims = self._scalar(_U32)
        where = f"{self._mapped.path}: tensor '{name}'"
        if num_dims > _MAX_DIMS:
            raise BrokenModel(f"{where} has {num_dims} dimensions, more than {_MAX_DIMS}; download the file again.")
        dims = tuple(self._scalar(_U64) for _ in range(num_dims))
        kind = ggml_type(self._scalar(_U32), where)
        offset = self._scalar(_U64)
        if dims and dims[0] % kind.block_elements:
            raise BrokenModel(f"{where} has rows of {dims[0]} elements, not whole {kind.name} blocks; convert the model again.")
        num_bytes = math.prod(dims) // kind.block_elements * kind.block_bytes
        return GGUFTensor(name, dims[::-1], kind, offset, num_bytes)

    def _check_inside(self, end: int) -> None:
        if end > self._mapped.size_bytes:
            raise BrokenModel(f"{self._mapped.path} ends inside its header; download the file again.")


def _version_name(version: int) -> str:
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    return f"{swapped} (big-endian)" if swapped in (2, 3) else str(version)
