"""Small GGUF and safetensors files, written by hand so that every byte can be made wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _INT64 = 4, 6, 7, 8, 9, 11

GgufBytes = Callable[..., bytes]
SafetensorsBytes = Callable[..., bytes]


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return (_INT64, struct.pack("<q", value)) if value < 0 else (_UINT32, struct.pack("<I", value))
    if isinstance(value, float):
        return _FLOAT32, struct.pack("<f", value)
    if isinstance(value, str):
        return _STRING, _string(value)
    typed = [_typed(item) for item in value]
    kind = typed[0][0] if typed else _UINT32
    return _ARRAY, struct.pack("<IQ", kind, len(typed)) + b"".join(raw for _, raw in typed)


def _gguf_bytes(
    metadata: Mapping[str, Any],
    tensors: Sequence[tuple[str, tuple[int, ...], int, bytes]] = (),
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """tensors: (name, dims in ggml order, ggml type, data)."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, raw = _typed(value)
        header += _string(key) + struct.pack("<I", kind) + raw
    data = b""
    for name, dims, kind, raw in tensors:
        data += b"\0" * (-len(data) % alignment)
        header += _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(data))
        data += raw
    return header + b"\0" * (-len(header) % alignment) + data if tensors else header


def _safetensors_bytes(tensors: Mapping[str, tuple[str, Sequence[int], bytes]], **overrides: Any) -> bytes:
    """tensors: name -> (dtype, shape, data); overrides replace header entries by name."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    header.update(overrides)
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


@pytest.fixture(scope="session")
def gguf_bytes() -> GgufBytes:
    return _gguf_bytes


@pytest.fixture(scope="session")
def safetensors_bytes() -> SafetensorsBytes:
    return _safetensors_bytes


@pytest.fixture(scope="session")
def good_gguf() -> bytes:
    metadata = {
        "general.architecture": "llama",
        "a.count": 7,
        "a.negative": -3,
        "a.ratio": 0.5,
        "a.flag": True,
        "a.names": ["x", "", "ü▁"],
        "a.numbers": [1, 2, 3],
        "a.flags": [True, False],
        "a.nested": [[1, 2], [3]],
    }
    tensors = [("f", (4, 2), 0, bytes(range(32))), ("q", (256, 3), 12, b"\x07" * (144 * 3))]
    return _gguf_bytes(metadata, tensors)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes], Path]:
    def write_file(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write_file
