"""The KV cache of one device: an arena a KV group and the view of each layer. Owns committing and block copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from brim.memory.arena.base import Arena
from brim.memory.arena.view import MemoryView, group_views
from brim.memory.kv_layout import KVLayout


class KVCache:
    """Arenas in group order. Only the committed prefix of a layer view may be touched.

    make_arenas builds one arena a group for `reach` blocks; memory_view is the platform's. Some blocks are committed before views
    are made: a device may refuse a view that begins at an address without memory.
    """

    def __init__(
        self,
        layout: KVLayout,
        reach: Sequence[int],
        committed: Sequence[int],
        dtype: torch.dtype,
        make_arenas: Callable[[Sequence[int]], list[Arena]],
        memory_view: MemoryView,
    ) -> None:
        self.layout = layout
        self.layer_views: list[Tensor] = []
        self._make_arenas = make_arenas
        self._dtype = dtype
        self._memory_view = memory_view
        self._block_views: list[Tensor] = []
        self._arenas: list[Arena] = []
        self.rebuild(reach, committed)

    def rebuild(self, reach: Sequence[int], committed: Sequence[int]) -> None:
        """Give everything back and build anew: addresses change, so whatever was recorded over them is void."""
        self.close()
        self._arenas = self._make_arenas(reach)
        self.resize(committed)
        views: dict[int, Tensor] = {}
        for arena, group in zip(self._arenas, self.layout.groups, strict=True):
            memory = self._memory_view(arena.address, arena.max_blocks * group.block_bytes)
            self._block_views.append(memory.view(arena.max_blocks, group.block_bytes))
            views.update(zip(group.layers, group_views(memory, self.layout, group, self._dtype), strict=True))
        self.layer_views.extend(views[layer] for layer in sorted(views))

    @property
    def committed_blocks(self) -> tuple[int, ...]:
        """Blocks backed by memory in each group, block 0 included."""
        return tuple(arena.committed_blocks for arena in self._arenas)

    @property
    def committed_bytes(self) -> int:
        """Bytes backed by memory, page or handle rounding included."""
        return sum(arena.committed_bytes for arena in self._arenas)

    def resize(self, blocks: Sequence[int], *, keep_content: bool = True) -> tuple[int, ...]:
        """Back blocks[g] blocks of each group, shrinking before growing (see Arena.resize); returns what is backed now.

        OutOfDeviceMemory leaves what was reached.
        """
        pairs = sorted(zip(self._arenas, blocks, strict=True), key=lambda p: p[1] - p[0].committed_blocks)
        for arena, count in pairs:
            arena.resize(count, keep_content=keep_content)
        return self.committed_blocks

    def copy_block(self, group: int, source: int, target: int) -> None:
        """Copy one block of a group, all its layers in one run of bytes."""
        self._block_views[group][target].copy_(self._block_views[group][source])

    def close(self) -> None:
        """Give the memory and the address ranges back; the views must not be used any more."""
        self.layer_views.clear()
        self._block_views.clear()
        for arena in self._arenas:
            arena.close()
        self._arenas = []
