"""The safetensors reader: one file, shards, and broken ones."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from brim.errors import BrimError, BrokenModel, ModelNotFound, UnsupportedModel
from brim.formats.safetensors_file import SafetensorsFile, SafetensorsShards, open_safetensors
from brim.formats.weight_file import WeightSource

Write = Callable[[str, bytes], Path]
_TWO = {"a": ("F32", (2, 2), bytes(range(16))), "b": ("BF16", (3,), b"abcdef")}


def test_reads_what_the_reference_wrote(tmp_path: Path) -> None:
    reference = pytest.importorskip("safetensors.numpy")
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.zeros((0, 4), np.float16), "z": np.array(5, np.int64)}
    path = tmp_path / "model.safetensors"
    reference.save_file(arrays, path)
    file = SafetensorsFile.open(path)
    assert isinstance(file, WeightSource)
    assert sorted(file.names()) == ["x", "y", "z"]
    assert file.info("x").shape == (2, 3) and file.info("x").dtype == "F32"
    assert np.array_equal(np.frombuffer(file.tensor_bytes("x"), np.float32).reshape(2, 3), arrays["x"])
    assert bytes(file.tensor_bytes("y")) == b""
    assert file.info("z").shape == ()
    for name in file.names():
        file.release(name)
    file.close()


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}, BrokenModel, "12 bytes where its shape needs 16"),
        ({"dtype": "F32", "shape": [2, 2], "data_offsets": [4, 20]}, BrokenModel, "overlap"),
        ({"dtype": "F32", "shape": [90], "data_offsets": [0, 360]}, BrokenModel, "truncated"),
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}, UnsupportedModel, "F4"),
        ({"dtype": ["F4"], "shape": [2], "data_offsets": [0, 1]}, UnsupportedModel, "stored as"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, BrokenModel, "not a count"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, BrokenModel, "not a count"),
        ({"dtype": "F32", "shape": [1]}, BrokenModel, "incomplete"),
        (5, BrokenModel, "incomplete"),
    ],
)
def test_bad_entries_say_so(write: Write, safetensors_bytes: Any, entry: Any, error: type[BrimError], message: str) -> None:
    path = write("m.safetensors", safetensors_bytes(_TWO, a=entry))
    with pytest.raises(error, match=message):
        SafetensorsFile.open(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 3) + b"{{{",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        struct.pack("<Q", 15) + b'{"a":1,"a":2}  ',
    ],
)
def test_bad_headers_say_so(write: Write, content: bytes) -> None:
    with pytest.raises(BrokenModel):
        SafetensorsFile.open(write("m.safetensors", content))


def _index(tmp_path: Path, weight_map: Any) -> Path:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_shards_read_as_one(tmp_path: Path, write: Write, safetensors_bytes: Any) -> None:
    write("s1.safetensors", safetensors_bytes({"a": _TWO["a"]}))
    write("s2.safetensors", safetensors_bytes({"b": _TWO["b"]}))
    index = _index(tmp_path, {"a": "s1.safetensors", "b": "s2.safetensors"})
    for source in (open_safetensors([index]), open_safetensors([tmp_path / "s1.safetensors", tmp_path / "s2.safetensors"])):
        assert sorted(source.names()) == ["a", "b"]
        assert bytes(source.tensor_bytes("b")) == b"abcdef"
        assert source.info("a").num_bytes == 16
        source.release("a")
        with pytest.raises(BrokenModel, match="no tensor 'c'"):
            source.info("c")
        source.close()


def test_missing_shards_and_wrong_indexes_say_so(tmp_path: Path, write: Write, safetensors_bytes: Any) -> None:
    write("s1.safetensors", safetensors_bytes({"a": _TWO["a"]}))
    with pytest.raises(BrokenModel, match=r"lacks the shard s9\.safetensors"):
        SafetensorsShards.open_index(_index(tmp_path, {"a": "s1.safetensors", "b": "s9.safetensors"}))
    with pytest.raises(BrokenModel, match="lacks the tensor 'b'"):
        SafetensorsShards.open_index(_index(tmp_path, {"b": "s1.safetensors"}))
    for bad in ({"a": "../s1.safetensors"}, {"a": ".."}, {"a": 5}, {}, None, []):
        with pytest.raises(BrokenModel):
            SafetensorsShards.open_index(_index(tmp_path, bad))
    with pytest.raises(ModelNotFound):
        SafetensorsShards.open_index(tmp_path / "absent.index.json")
    write("s2.safetensors", safetensors_bytes({"a": _TWO["a"]}))
    with pytest.raises(BrokenModel, match="both hold 'a'"):
        SafetensorsShards.open_files([tmp_path / "s1.safetensors", tmp_path / "s2.safetensors"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_raises_only_brim_errors(write: Write, safetensors_bytes: Any, data: st.DataObject) -> None:
    good = safetensors_bytes(_TWO)
    content = bytearray(good[: data.draw(st.integers(0, len(good)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            at = data.draw(st.integers(0, len(content) - 1))
            content[at : at + 1] = data.draw(st.sampled_from([b"9", b"-", b"{", b'"', b"\xff", b"", b"1e9", b"null", b","]))
    try:
        file = SafetensorsFile.open(write("fuzz.safetensors", bytes(content)))
    except BrimError:
        return
    for name in file.names():
        assert len(file.tensor_bytes(name)) == file.info(name).num_bytes
    file.close()
