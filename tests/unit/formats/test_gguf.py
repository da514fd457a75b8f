"""The GGUF reader: values, views, and that broken files end in one clear error."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from brim.errors import BrimError, BrokenModel, ModelNotFound, UnsupportedModel
from brim.formats.ggml_type import GGMLType
from brim.formats.gguf import GGUFFile
from brim.formats.weight_file import WeightSource

Write = Callable[[str, bytes], Path]


def test_metadata_becomes_plain_values(write: Write, good_gguf: bytes) -> None:
    file = GGUFFile.open(write("m.gguf", good_gguf))
    values = file.metadata
    assert (values["a.count"], values["a.negative"], values["a.ratio"], values["a.flag"]) == (7, -3, 0.5, True)
    assert values["a.names"] == ["x", "", "ü▁"]
    assert values["a.numbers"].tolist() == [1, 2, 3]
    assert values["a.flags"].dtype == np.bool_
    assert [part.tolist() for part in values["a.nested"]] == [[1, 2], [3]]


def test_tensors_have_torch_shapes_and_their_bytes(write: Write, good_gguf: bytes) -> None:
    file = GGUFFile.open(write("m.gguf", good_gguf))
    assert isinstance(file, WeightSource)
    assert file.names() == ["f", "q"]
    assert file.info("f").shape == (2, 4)
    assert bytes(file.tensor_bytes("f")) == bytes(range(32))
    quantised = file.info("q")
    assert (quantised.ggml_type, quantised.num_bytes) == (GGMLType.Q4_K, 432)
    file.release("q")
    assert bytes(file.tensor_bytes("q")) == b"\x07" * 432
    with pytest.raises(BrokenModel, match="no tensor 'z'"):
        file.info("z")
    file.close()


def test_agrees_with_the_reference_writer(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "ref.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_float64("x.double", 0.25)
    weights = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("w", weights)
    writer.add_tensor("h", weights.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile.open(path)
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "b"]
    assert file.metadata["x.double"] == 0.25
    assert np.array_equal(np.frombuffer(file.tensor_bytes("w"), np.float32).reshape(file.info("w").shape), weights)
    assert np.array_equal(np.frombuffer(file.tensor_bytes("h"), np.float16).reshape(2, 32), weights.astype(np.float16))


def test_missing_and_empty_files(tmp_path: Path, write: Write) -> None:
    with pytest.raises(ModelNotFound, match="There is no file"):
        GGUFFile.open(tmp_path / "absent.gguf")
    with pytest.raises(BrokenModel, match="is empty"):
        GGUFFile.open(write("empty.gguf", b""))
    with pytest.raises(ModelNotFound):
        GGUFFile.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda b: b"GGML" + b[4:], BrokenModel, "not a GGUF file"),
        (lambda b: b[:4] + struct.pack("<I", 1) + b[8:], UnsupportedModel, "version 1"),
        (lambda b: b[:4] + struct.pack(">I", 3) + b[8:], UnsupportedModel, "big-endian"),
        (lambda b: b[:-1], BrokenModel, "truncated"),
        (lambda b: b[:100], BrokenModel, "ends inside its header"),
        (lambda b: b[:8] + struct.pack("<Q", 1 << 60) + b[16:], BrokenModel, "ends inside its header"),
    ],
)
def test_broken_files_say_so(
    write: Write, good_gguf: bytes, change: Callable[[bytes], bytes], error: type[BrimError], message: str
) -> None:
    path = write("m.gguf", change(good_gguf))
    with pytest.raises(error, match=message) as caught:
        GGUFFile.open(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "tensors", "error", "message"),
    [
        ({}, [("w", (32, 1), 10, b"")], UnsupportedModel, "Q2_K"),
        ({}, [("w", (32, 1), 99, b"")], BrokenModel, "unknown type 99"),
        ({}, [("w", (31, 1), 8, b"\0" * 64)], BrokenModel, "not whole Q8_0 blocks"),
        ({}, [("w", (1, 1, 1, 1, 1), 0, b"\0" * 4)], BrokenModel, "5 dimensions"),
        ({}, [("w", (1,), 0, b"\0" * 4), ("w", (1,), 0, b"\0" * 4)], BrokenModel, "twice"),
        ({"general.alignment": 3}, [], BrokenModel, "alignment"),
        ({"split.count": 4}, [], UnsupportedModel, "one of 4 parts"),
    ],
)
def test_inconsistent_headers_say_so(
    write: Write, gguf_bytes: Any, metadata: Any, tensors: Any, error: type[BrimError], message: str
) -> None:
    with pytest.raises(error, match=message):
        GGUFFile.open(write("m.gguf", gguf_bytes(metadata, tensors)))


_FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@_FUZZ
@given(data=st.data())
def test_damage_raises_only_brim_errors(write: Write, good_gguf: bytes, data: st.DataObject) -> None:
    content = bytearray(good_gguf[: data.draw(st.integers(0, len(good_gguf)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            at = data.draw(st.integers(0, len(content) - 1))
            content[at : at + 8] = data.draw(st.binary(min_size=1, max_size=8))
    path = write("fuzz.gguf", bytes(content))
    try:
        file = GGUFFile.open(path)
    except BrimError as error:
        assert str(path) in str(error)
        return
    for name in file.names():
        assert len(file.tensor_bytes(name)) == file.info(name).num_bytes
        file.release(name)
    file.close()
