"""A KV cache over virtual memory: its content over real bytes, the cap over a scripted device, closing one that refuses."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.platforms.scripted_gpu import PID, Opened, ScriptedGpu, small_gpu

from brim.errors import DeviceError, OutOfDeviceMemory
from brim.memory.arena.base import Arena
from brim.memory.arena.factory import new_arena, new_arenas
from brim.memory.arena.static_arena import Allocation, StaticArena
from brim.memory.arena.virtual_arena import VirtualArena
from brim.memory.kv_layout import KVGroup, KVLayout
from brim.platforms.cpu import CpuPlatform
from brim.units import GIB, MIB
from brim.worker.kv_cache import KVCache

LAYOUT = KVLayout(  # blocks of 1,024 and 2,048 bytes
    groups=(KVGroup("full", (2, 5), 0, 2 * 2 * 4 * 1 * 16 * 4), KVGroup("sliding", (0, 1, 3, 4), 8, 4 * 2 * 4 * 1 * 16 * 4)),
    block_size=4,
    num_kv_heads=1,
    head_dim=16,
    element_bytes=4,
)
UNIT_BYTES = 4096
NEVER_MAPPED, FRESH, GONE = 0xEE, 0xCC, 0xDD


class HostDriver:
    """Virtual memory over host bytes: what is not mapped holds a pattern, and mapping overwrites what was there.

    room_bytes is what the device has. Handles are mapped whole, once, and are released after they are unmapped.
    """

    def __init__(self, room_bytes: int) -> None:
        self.room_bytes = room_bytes
        self.ranges: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.created: dict[int, int] = {}  # handle -> bytes
        self.mapped: dict[int, int] = {}  # address -> handle
        self._next = 0

    def reserve(self, num_bytes: int) -> int:
        buffer = ctypes.create_string_buffer(num_bytes)
        address = ctypes.addressof(buffer)
        ctypes.memset(address, NEVER_MAPPED, num_bytes)
        self.ranges[address] = buffer
        return address

    def free_range(self, address: int, num_bytes: int) -> None:
        assert len(self.ranges[address]) == num_bytes
        assert not [start for start in self.mapped if address <= start < address + num_bytes]
        del self.ranges[address]

    def create(self, num_bytes: int) -> int:
        if sum(self.created.values()) + num_bytes > self.room_bytes:
            raise OutOfDeviceMemory("full")
        self._next += 1
        self.created[self._next] = num_bytes
        return self._next

    def release(self, handle: int) -> None:
        assert handle not in self.mapped.values()
        del self.created[handle]

    def map(self, address: int, num_bytes: int, handle: int) -> None:
        assert self.created[handle] == num_bytes and handle not in self.mapped.values()
        for start, other in self.mapped.items():
            assert start + self.created[other] <= address or address + num_bytes <= start
        self.mapped[address] = handle
        ctypes.memset(address, FRESH, num_bytes)

    def unmap(self, address: int, num_bytes: int) -> None:
        assert self.created[self.mapped.pop(address)] == num_bytes
        ctypes.memset(address, GONE, num_bytes)

    def synchronize(self) -> None:
        """Nothing is queued."""

    def arenas(self, reach: Sequence[int]) -> list[Arena]:
        """For KVCache."""
        return [
            VirtualArena(group.block_bytes, count, driver=self, granularity_bytes=UNIT_BYTES)
            for group, count in zip(LAYOUT.groups, reach, strict=True)
        ]


def fill(cache: KVCache, group: int, block: int, value: float) -> None:
    """Each layer's part of the block gets a value of its own."""
    for layer in LAYOUT.groups[group].layers:
        cache.layer_views[layer][block].fill_(value + layer)


def holds(cache: KVCache, group: int, block: int, value: float) -> bool:
    return all(bool((cache.layer_views[layer][block] == value + layer).all()) for layer in LAYOUT.groups[group].layers)


SIZES = st.tuples(st.integers(1, 90), st.integers(1, 70))


@settings(max_examples=80, deadline=None)
@given(
    steps=st.lists(st.tuples(SIZES, st.booleans()), max_size=10),
    room_units=st.integers(60, 140),
    copies=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 89), st.integers(0, 89)), max_size=4),
)
def test_a_cache_that_grows_and_shrinks_keeps_its_blocks(
    steps: list[tuple[tuple[int, int], bool]], room_units: int, copies: list[tuple[int, int, int]]
) -> None:
    driver = HostDriver(room_units * UNIT_BYTES)
    cache = KVCache(LAYOUT, (90, 70), (1, 1), torch.float32, driver.arenas, CpuPlatform().memory_view)
    written: dict[tuple[int, int], float] = {}
    for number, (asked, keep_content) in enumerate(steps):
        before, is_reached = cache.committed_blocks, True
        try:
            committed = cache.resize(asked, keep_content=keep_content)
            assert committed == cache.committed_blocks
        except OutOfDeviceMemory:
            is_reached = False
        now = cache.committed_blocks
        assert cache.committed_bytes == sum(driver.created.values()) == sum(driver.created[h] for h in driver.mapped.values())
        assert cache.committed_bytes <= driver.room_bytes
        if is_reached:  # as the guard requires: no less than asked, so that blocks in use are never dropped
            assert all(have >= want for have, want in zip(now, asked, strict=True))
        else:
            assert all(have >= min(had, want) for have, had, want in zip(now, before, asked, strict=True)) or not keep_content
        if keep_content:
            written = {at: value for at, value in written.items() if at[1] < now[at[0]]}
            assert all(holds(cache, *at, value) for at, value in written.items())
        else:
            assert not is_reached or cache.committed_bytes == sum(
                a.bytes_for(n) for a, n in zip(cache._arenas, asked, strict=True)
            )
            written = {}
        for group, count in enumerate(now):
            for block in range(count):
                written[group, block] = 1000.0 * number + 10 * block
                fill(cache, group, block, written[group, block])
        for group, source, target in copies:
            if max(source, target) < now[group]:
                cache.copy_block(group, source, target)
                written[group, target] = written[group, source]
        assert all(holds(cache, *at, value) for at, value in written.items())
    cache.close()
    cache.close()
    assert (driver.created, driver.mapped, driver.ranges) == ({}, {}, {})


def test_a_cache_that_is_built_anew_leaves_nothing_of_the_old_one() -> None:
    driver = HostDriver(100 * UNIT_BYTES)
    cache = KVCache(LAYOUT, (90, 70), (40, 10), torch.float32, driver.arenas, CpuPlatform().memory_view)
    cache.rebuild((20, 20), (20, 20))
    assert len(driver.ranges) == 2 and cache.committed_blocks == (20, 20)
    assert [view.shape[0] for view in cache.layer_views] == [20] * 6
    with pytest.raises(OutOfDeviceMemory):
        cache.rebuild((400, 400), (400, 400))
    cache.close()
    assert (driver.created, driver.mapped, driver.ranges) == ({}, {}, {})


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(1, 1200), st.integers(1, 1200)), max_size=8), cap_mib=st.integers(700, 7000))
def test_a_cache_on_a_device_keeps_the_cap(steps: list[tuple[int, int]], cap_mib: int) -> None:
    layout = KVLayout(
        (KVGroup("full", (0,), 0, 3 * MIB), KVGroup("sliding", (1,), 8, 3 * MIB)),
        block_size=16,
        num_kv_heads=8,
        head_dim=3 * MIB // (2 * 16 * 8 * 2),
        element_bytes=2,
    )
    opened = Opened(small_gpu(PID))
    opened.platform.set_cap(cap_mib * MIB)

    def meta_view(address: int, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device="meta")

    cache = KVCache(
        layout, (1200, 1200), (1, 1), torch.float16, lambda reach: new_arenas(opened.platform, layout, reach), meta_view
    )
    for asked in steps:
        before = cache.committed_blocks
        try:
            reached = cache.resize(asked)
            assert all(have >= want for have, want in zip(reached, asked, strict=True))
        except OutOfDeviceMemory:
            wanted_bytes = sum(arena.bytes_for(n) for arena, n in zip(cache._arenas, map(max, asked, before), strict=True))
            assert wanted_bytes + 300 * MIB > cap_mib * MIB
        assert opened.gpu.ours_bytes <= cap_mib * MIB
        assert opened.platform.arena_bytes == cache.committed_bytes == opened.gpu.ours["arena"] == opened.bindings.mapped_bytes
        opened.require_truth()
    cache.close()
    assert opened.platform.arena_bytes == 0 and (opened.bindings.ranges, opened.bindings.handles) == ({}, {})


def test_close_gives_back_all_that_the_driver_takes() -> None:
    opened = Opened(ScriptedGpu(PID))
    arena = new_arena(opened.platform, 64 * MIB, 64)
    arena.resize(10)
    opened.gpu.failing["cuMemUnmap"] = [0, 0, 1]
    with pytest.raises(DeviceError, match="cuMemUnmap"):
        arena.close()
    assert arena.closed and opened.bindings.mapped_bytes == 64 * MIB  # only the one that it refused
    arena.close()
    assert opened.platform.arena_bytes == 0


def test_a_static_arena_whose_allocation_dies_is_not_counted() -> None:
    held: list[int] = []

    def lose(num_bytes: int) -> Allocation:
        raise RuntimeError("CUDA error: unspecified launch failure")

    with pytest.raises(RuntimeError, match="launch failure"):
        StaticArena(MIB, 10, account=held.append, allocate=lose)
    assert sum(held) == 0


def test_a_device_without_virtual_memory_gets_one_allocation() -> None:
    opened = Opened(ScriptedGpu(PID), driver=False)
    opened.platform._zeros = lambda num_bytes, device: _taken(opened, num_bytes)
    opened.platform.set_cap(5 * GIB)
    arena = new_arena(opened.platform, 64 * MIB, 64)
    assert isinstance(arena, StaticArena) and not arena.growable
    opened.require_truth()  # counted once: as torch's, not beside it
    assert opened.gpu.ours_bytes == 520 * MIB + 4 * GIB
    room_bytes = 5 * GIB - opened.gpu.ours_bytes
    assert not opened.runtime.take(room_bytes + 2 * MIB)
    with pytest.raises(OutOfDeviceMemory, match="cap"):
        new_arena(opened.platform, 64 * MIB, 64)
    arena.close()
    assert opened.platform.arena_bytes == 0


def _taken(opened: Opened, num_bytes: int) -> torch.Tensor:
    if not opened.runtime.take(num_bytes):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return torch.zeros(1, dtype=torch.uint8)
