"""Torch views over an arena's range. Owns the strides that turn block-major memory into one tensor a layer.

The views span the whole reserved range; only the committed prefix of blocks may be touched, and nothing after close.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from brim.memory.kv_layout import KVGroup, KVLayout

MemoryView = Callable[[int, int], Tensor]


def group_views(memory: Tensor, layout: KVLayout, group: KVGroup, dtype: torch.dtype) -> list[Tensor]:
    """One view [blocks, 2, block_size, kv_heads, head_dim] a layer of the group, in layer order, of an arena's whole range.

    memory: uint8 [blocks * block bytes].
    A block is [layers, 2, block_size, kv_heads, head_dim] in one run, so a layer's view strides over the other layers.
    """
    assert dtype.itemsize == layout.element_bytes, f"{dtype} has not {layout.element_bytes} bytes"
    assert memory.numel() % group.block_bytes == 0, "whole blocks of this group"
    block_size, heads, dim = layout.block_size, layout.num_kv_heads, layout.head_dim
    side = block_size * heads * dim  # elements of K, or of V, of one layer in one block
    block = group.block_bytes // dtype.itemsize
    assert block == 2 * side * len(group.layers), "group and layout disagree"
    flat = memory.view(dtype)
    shape = (memory.numel() // group.block_bytes, 2, block_size, heads, dim)
    strides = (block, side, heads * dim, dim, 1)
    return [flat.as_strided(shape, strides, 2 * side * index) for index in range(len(group.layers))]
