"""Builds the arena that a platform's capabilities name. Owns the mapping from backend name to class. Torch-free."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial

from brim.errors import ConfigError
from brim.memory.arena.base import Arena
from brim.memory.arena.mmap_arena import HUGE_PAGE_BYTES, MmapArena
from brim.memory.arena.static_arena import Allocation, StaticArena, allocate_host
from brim.memory.arena.virtual_arena import VirtualArena
from brim.memory.kv_layout import KVLayout
from brim.platforms.base import Platform


def new_arena(platform: Platform, block_bytes: int, max_blocks: int) -> Arena:
    """An arena on the platform whose commits are accounted there.

    A backend "module:Class" of a third party is called as Class(block_bytes, max_blocks, platform=platform).
    Raises OutOfDeviceMemory where the range (static: the memory) is not to be had, ConfigError for an unknown backend.
    """
    backend = platform.capabilities.arena_backend
    if backend == "mmap":
        granularity_bytes = platform.capabilities.granularity_bytes
        return MmapArena(
            block_bytes,
            max_blocks,
            granularity_bytes=granularity_bytes,
            account=platform.account,
            huge_pages=platform.capabilities.host_memory and granularity_bytes % HUGE_PAGE_BYTES == 0,
        )
    if backend == "static":
        return StaticArena(block_bytes, max_blocks, allocate=partial(_allocate, platform), account=platform.account)
    if backend == "virtual":
        granularity_bytes = platform.capabilities.granularity_bytes
        driver = platform.virtual_memory()
        return VirtualArena(block_bytes, max_blocks, driver=driver, granularity_bytes=granularity_bytes, account=platform.account)
    module, colon, name = backend.partition(":")
    if not colon:
        raise ConfigError(f"Platform '{platform.name}' names an unknown arena backend '{backend}'.")
    arena: Arena = getattr(importlib.import_module(module), name)(block_bytes, max_blocks, platform=platform)
    return arena


def _allocate(platform: Platform, num_bytes: int) -> Allocation:
    plain = platform.plain_memory(num_bytes)
    return allocate_host(num_bytes) if plain is None else Allocation(*plain)


def new_arenas(platform: Platform, layout: KVLayout, max_blocks: Sequence[int]) -> list[Arena]:
    """One arena a KV group, in group order; all of them or, with what was reserved given back, none."""
    arenas: list[Arena] = []
    try:
        for group, count in zip(layout.groups, max_blocks, strict=True):
            arenas.append(new_arena(platform, group.block_bytes, count))
    except BaseException:
        for arena in arenas:
            arena.close()
        raise
    return arenas
