"""Both dequantisers against the gguf package's own."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from brim.errors import UnsupportedModel
from brim.kernels.cpu.kernels import CpuKernels
from brim.kernels.dequantize import BLOCK_TYPES, dequantize, row_bytes

from .helpers import random_blocks


@pytest.mark.parametrize("ggml_type", BLOCK_TYPES, ids=[block.name for block in BLOCK_TYPES.values()])
@pytest.mark.parametrize(("rows", "cols"), [(1, 256), (70, 512), (300, 1280)])
def test_same_bits_as_gguf(kernels: CpuKernels, ggml_type: int, rows: int, cols: int) -> None:
    raw = random_blocks(ggml_type, rows, cols)
    quant = gguf.GGMLQuantizationType(ggml_type)
    stored = {"F32": np.float32, "F16": np.float16}.get(BLOCK_TYPES[ggml_type].name)
    source = raw.view(stored) if stored else raw
    expected = torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(source, quant), dtype=np.float32))
    for native in (None, kernels):
        out = torch.full((rows, cols + 16), float("nan"))[:, :cols]
        dequantize(memoryview(raw.reshape(-1)), ggml_type, rows, cols, out, native)
        assert torch.equal(out, expected)
        for dtype in (torch.bfloat16, torch.float16):
            narrow = torch.full((rows, cols), float("nan"), dtype=dtype)
            dequantize(raw, ggml_type, rows, cols, narrow, native)
            assert torch.equal(narrow, expected.to(dtype))


def test_what_cannot_be_read_is_said() -> None:
    with pytest.raises(UnsupportedModel, match="type 19 is not supported"):
        row_bytes(19, 256)
    with pytest.raises(UnsupportedModel, match="not whole Q4_K blocks"):
        row_bytes(12, 300)
