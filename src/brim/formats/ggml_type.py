"""The storage types of GGUF tensors: their numbers, names and block sizes. Owns no data and no dequantisation.

Source: the GGUF specification (ggml, docs/gguf.md) and the block structs of ggml.
"""

from __future__ import annotations

from enum import IntEnum

from brim.errors import BrokenModel, UnsupportedModel


class GGMLType(IntEnum):
    """The types Brim can load. A block is the unit of quantisation along the fastest dimension.

    Worked example: 512 elements of Q4_K are 2 blocks of 256 elements, 144 bytes each: 288 bytes.
    """

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30

    @property
    def block_elements(self) -> int:
        """Elements in one block (1 for the float types)."""
        return _BLOCKS[self][0]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return _BLOCKS[self][1]


_BLOCKS: dict[GGMLType, tuple[int, int]] = {
    GGMLType.F32: (1, 4),
    GGMLType.F16: (1, 2),
    GGMLType.BF16: (1, 2),
    GGMLType.Q4_0: (32, 18),
    GGMLType.Q4_1: (32, 20),
    GGMLType.Q5_0: (32, 22),
    GGMLType.Q5_1: (32, 24),
    GGMLType.Q8_0: (32, 34),
    GGMLType.Q4_K: (256, 144),
    GGMLType.Q5_K: (256, 176),
    GGMLType.Q6_K: (256, 210),
}

_OTHER_NAMES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip


def ggml_type(number: int, where: str) -> GGMLType:
    """The type with this number; `where` names file and tensor for the message.

    Raises UnsupportedModel for a type ggml has and Brim has not, BrokenModel for a number ggml never gave out.
    """
    try:
        return GGMLType(number)
    except ValueError:
        pass
    supported = ", ".join(t.name for t in GGMLType)
    if number in _OTHER_NAMES:
        raise UnsupportedModel(f"{where} is stored as {_OTHER_NAMES[number]}; Brim loads {supported}: use such a file.")
    raise BrokenModel(f"{where} has the unknown type {number}; Brim loads {supported}. Download or convert the file again.")
