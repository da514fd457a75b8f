"""Safetensors files, one or several shards. Owns the header, its validation, and views of tensor data.

Layout, from the safetensors format description: u64 header length, JSON header {name: {dtype, shape, data_offsets}}, data.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brim.errors import BrokenModel, UnsupportedModel
from brim.formats.mapped_file import MappedFile, MappedTensors
from brim.formats.weight_file import WeightSource

INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000
_DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """One tensor. `dtype` is the file's name for it ("BF16"); `offset` counts from the start of its file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    num_bytes: int


class SafetensorsFile(MappedTensors[SafetensorsTensor]):
    """One open .safetensors file. A WeightSource."""

    @classmethod
    def open(cls, path: Path | str) -> SafetensorsFile:
        """Map and check the file; only its header is read. Raises ModelNotFound, BrokenModel, UnsupportedModel (dtypes)."""
        mapped = MappedFile(Path(path))
        try:
            return cls(mapped, _read_tensors(mapped))
        except BaseException:
            mapped.close()
            raise


class SafetensorsShards:
    """Several .safetensors files as one WeightSource; `where` says in which file each tensor lies."""

    def __init__(self, files: Sequence[SafetensorsFile], where: dict[str, SafetensorsFile]) -> None:
        self._files = tuple(files)
        self._where = where

    @classmethod
    def open_index(cls, path: Path | str) -> SafetensorsShards:
        """The shards of a `model.safetensors.index.json`, which must all lie beside it and hold what it says."""
        path = Path(path)
        weight_map = _read_index(path)
        files: dict[str, SafetensorsFile] = {}
        try:
            for shard in sorted(set(weight_map.values())):
                shard_path = path.parent / shard
                if not shard_path.is_file():
                    raise BrokenModel(f"{path.parent} lacks the shard {shard} that {path.name} names; download the model again.")
                files[shard] = SafetensorsFile.open(shard_path)
            for name, shard in weight_map.items():
                if name not in files[shard].tensors:
                    raise BrokenModel(
                        f"{path.parent / shard} lacks the tensor '{name}' that {path.name} puts there; download it again."
                    )
        except BaseException:
            _close_all(files.values())
            raise
        return cls(tuple(files.values()), {name: files[shard] for name, shard in weight_map.items()})

    @classmethod
    def open_files(cls, paths: Sequence[Path]) -> SafetensorsShards:
        """Several files without an index. Raises BrokenModel where two hold the same tensor."""
        files: list[SafetensorsFile] = []
        where: dict[str, SafetensorsFile] = {}
        try:
            for path in paths:
                file = SafetensorsFile.open(path)
                files.append(file)
                for name in file.names():
                    if name in where:
                        raise BrokenModel(
                            f"{where[name].path} and {path} both hold '{name}'; remove the file that does not belong."
                        )
                    where[name] = file
        except BaseException:
            _close_all(files)
            raise
        return cls(files, where)

    def names(self) -> list[str]:
        """Tensor names."""
        return list(self._where)

    def info(self, name: str) -> SafetensorsTensor:
        """Raises BrokenModel for a name the files do not have."""
        return self._file(name).info(name)

    def tensor_bytes(self, name: str) -> memoryview:
        """The stored bytes, as a view over the mapping."""
        return self._file(name).tensor_bytes(name)

    def release(self, name: str) -> None:
        """Drop the tensor's pages from resident memory."""
        self._file(name).release(name)

    def close(self) -> None:
        """Unmap."""
        _close_all(self._files)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._where:
            folder = self._files[0].path.parent if self._files else "the model"
            raise BrokenModel(f"{folder} has no tensor '{name}'; download the model again.")
        return self._where[name]


def open_safetensors(paths: Sequence[Path]) -> WeightSource:
    """The weights of a model folder: its index file, its single file, or its several files."""
    if len(paths) == 1 and paths[0].name.endswith(".index.json"):
        return SafetensorsShards.open_index(paths[0])
    if len(paths) == 1:
        return SafetensorsFile.open(paths[0])
    return SafetensorsShards.open_files(paths)


def _close_all(files: Any) -> None:
    for file in files:
        file.close()


def _read_tensors(mapped: MappedFile) -> dict[str, SafetensorsTensor]:
    path = mapped.path
    header_bytes = int.from_bytes(mapped.data[:8], "little")
    data_start = 8 + header_bytes
    if mapped.size_bytes < 8 or header_bytes > _MAX_HEADER_BYTES or data_start > mapped.size_bytes:
        raise BrokenModel(f"{path} is truncated or not a safetensors file; download it again.")
    header = _parse_json_object(bytes(mapped.data[8:data_start]), path)
    header.pop("__metadata__", None)
    data_bytes = mapped.size_bytes - data_start
    tensors = [_checked_tensor(name, entry, path, data_start, data_bytes) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.num_bytes))
    for before, after in itertools.pairwise(tensors):
        if before.offset + before.num_bytes > after.offset:
            raise BrokenModel(f"{path}: tensors '{before.name}' and '{after.name}' overlap; download the file again.")
    return {tensor.name: tensor for tensor in tensors}


def _checked_tensor(name: str, entry: Any, path: Path, data_start: int, data_bytes: int) -> SafetensorsTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise BrokenModel(f"{path}: the header of tensor '{name}' is incomplete; download the file again.") from error
    if dtype not in _DTYPE_BYTES if isinstance(dtype, str) else True:
        raise UnsupportedModel(f"{path}: tensor '{name}' is stored as {dtype}, which Brim does not load; use another file.")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise BrokenModel(f"{path}: the header of tensor '{name}' has a number that is not a count; download the file again.")
    if end > data_bytes:
        raise BrokenModel(
            f"{path} is truncated: tensor '{name}' ends at byte {data_start + end:,} and the file has "
            f"{data_start + data_bytes:,}; download it again."
        )
    num_bytes = math.prod(shape) * _DTYPE_BYTES[dtype]
    if end - begin != num_bytes:
        raise BrokenModel(
            f"{path}: tensor '{name}' has {end - begin:,} bytes where its shape needs {num_bytes:,}; download it again."
        )
    return SafetensorsTensor(name, shape, dtype, data_start + begin, num_bytes)


def _read_index(path: Path) -> dict[str, str]:
    mapped = MappedFile(path)
    try:
        content = bytes(mapped.data[:_MAX_HEADER_BYTES])
    finally:
        mapped.close()
    weight_map = _parse_json_object(content, path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise BrokenModel(f"{path} has no usable 'weight_map'; download the model again.")
    for shard in set(weight_map.values()):
        if Path(shard).name != shard or shard in ("", ".", "..") or "\0" in shard:
            raise BrokenModel(f"{path} names the shard '{shard}', which is not a plain file name; download the model again.")
    return weight_map


def _parse_json_object(content: bytes, path: Path) -> dict[str, Any]:
    """A JSON object without repeated keys. Raises BrokenModel."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name occurs twice")
        return result

    try:
        parsed = json.loads(content, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise BrokenModel(f"{path} has a header that is not valid JSON ({error}); download it again.") from error
    if not isinstance(parsed, dict):
        raise BrokenModel(f"{path} has a header that is not a JSON object; download it again.")
    return parsed
