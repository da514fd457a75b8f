"""The arena of a CUDA device over a scripted driver: what is mapped is what is accounted, whole handles, nothing left behind."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.platforms.scripted_driver import OUT_OF_MEMORY, ScriptedDriver
from tests.unit.platforms.scripted_gpu import ScriptedGpu, small_gpu

from brim.errors import DeviceError, DeviceLost, OutOfDeviceMemory
from brim.memory.arena.virtual_arena import HANDLE_BYTES, VirtualArena
from brim.platforms.cuda_driver import CudaDriver
from brim.units import GIB, MIB


class Setup:
    """A driver, an account of it and a way to make arenas."""

    def __init__(self, gpu: ScriptedGpu | None = None) -> None:
        self.gpu = gpu or small_gpu(1)
        self.bindings = ScriptedDriver(self.gpu)
        self.driver = CudaDriver(0, self.bindings)
        self.held_bytes = 0

    def account(self, delta_bytes: int) -> None:
        self.held_bytes += delta_bytes
        assert self.held_bytes >= 0

    def arena(self, block_bytes: int, max_blocks: int) -> VirtualArena:
        return VirtualArena(
            block_bytes, max_blocks, driver=self.driver, granularity_bytes=self.bindings.granularity_bytes, account=self.account
        )

    def check(self, *arenas: VirtualArena) -> None:
        """Mapped, held by the driver, counted by the arenas and accounted are one number."""
        committed_bytes = sum(arena.committed_bytes for arena in arenas)
        created_bytes = sum(handle.num_bytes for handle in self.bindings.handles.values())
        assert committed_bytes == self.bindings.mapped_bytes == created_bytes == self.held_bytes
        assert max((h.num_bytes for h in self.bindings.handles.values()), default=0) <= HANDLE_BYTES

    def require_clean(self) -> None:
        """Nothing is left."""
        assert (self.held_bytes, self.bindings.handles, self.bindings.ranges) == (0, {}, {})


def poke(setup: Setup, arena: VirtualArena, block: int, value: int) -> None:
    start = arena.address + block * arena.block_bytes
    setup.bindings.write(start, value)
    setup.bindings.write(start + arena.block_bytes - 1, value)


def holds(setup: Setup, arena: VirtualArena, block: int, value: int) -> bool:
    start = arena.address + block * arena.block_bytes
    return setup.bindings.read(start) == value == setup.bindings.read(start + arena.block_bytes - 1)


@settings(max_examples=150, deadline=None)
@given(
    block_bytes=st.sampled_from([100, 96 * 1024, 2 * MIB, 3 * MIB, 40 * MIB, 300 * MIB]),
    max_blocks=st.integers(1, 60),
    steps=st.lists(
        st.tuples(st.floats(0, 1), st.booleans(), st.sampled_from(["", "", "cuMemCreate", "cuMemMap", "cuMemSetAccess"])),
        max_size=10,
    ),
    code=st.sampled_from([OUT_OF_MEMORY, 1]),
    fails_after=st.integers(0, 3),
)
def test_any_order_of_resizes(
    block_bytes: int,
    max_blocks: int,
    steps: list[tuple[float, bool, str]],
    code: int,
    fails_after: int,
) -> None:
    setup = Setup()
    arena = setup.arena(block_bytes, max_blocks)
    address, values = arena.address, dict[int, int]()
    for number, (fraction, keep_content, failing) in enumerate(steps):
        target, before, before_bytes = round(fraction * max_blocks), arena.committed_blocks, arena.committed_bytes
        setup.gpu.failing = {failing: [0] * fails_after + [code]} if failing else {}
        try:
            arena.resize(target, keep_content=keep_content)
            reached = target
        except (OutOfDeviceMemory, DeviceError) as error:
            assert isinstance(error, OutOfDeviceMemory) or code != OUT_OF_MEMORY
            reached = None
        setup.gpu.failing = {}
        setup.check(arena)
        assert arena.address == address and 0 <= arena.committed_blocks <= max_blocks
        if reached is None and (keep_content or arena.bytes_for(target) >= before_bytes):
            assert (arena.committed_blocks, arena.committed_bytes) == (before, before_bytes)
        if reached is not None:
            assert arena.committed_blocks >= reached and arena.committed_bytes >= arena.bytes_for(reached)
            if not keep_content or arena.bytes_for(reached) >= before_bytes:
                assert arena.committed_bytes == arena.bytes_for(reached)
            assert arena.committed_bytes - arena.bytes_for(reached) < HANDLE_BYTES
        if keep_content:
            kept = before if reached is None else min(before, arena.committed_blocks)
            assert all(holds(setup, arena, block, values[block]) for block in range(kept))
        values = dict.fromkeys(range(arena.committed_blocks), number)
        for block, value in values.items():
            poke(setup, arena, block, value)
    arena.close()
    arena.close()
    setup.require_clean()


def test_few_large_handles_and_an_exact_tail() -> None:
    setup = Setup()
    arena = setup.arena(3 * MIB, 400_000)  # a range of 1.1 TiB: the largest handles
    arena.resize(347)  # 1041 MiB
    assert sorted(h.num_bytes // MIB for h in setup.bindings.handles.values()) == [18, 256, 256, 256, 256]
    assert arena.committed_bytes == 1042 * MIB and arena.committed_blocks == 347
    arena.resize(100)  # 300 MiB: the second handle straddles
    assert arena.committed_bytes == 512 * MIB and arena.committed_blocks == 170
    setup.check(arena)
    arena.resize(100, keep_content=False)
    assert arena.committed_bytes == 300 * MIB and arena.committed_blocks == 100
    arena.commit(50)
    assert arena.committed_blocks == 100
    arena.uncommit(0)
    assert arena.committed_bytes == 0
    arena.close()
    setup.require_clean()


def test_memory_that_is_not_there_leaves_the_old_size() -> None:
    setup = Setup(ScriptedGpu(1, total_bytes=2 * GIB, ours={"context": 0}))
    arena = setup.arena(64 * MIB, 100)
    arena.resize(10)
    with pytest.raises(OutOfDeviceMemory, match="KV cache"):
        arena.resize(50)
    setup.check(arena)
    assert arena.committed_blocks == 10
    arena.resize(32)
    setup.check(arena)
    arena.close()
    setup.require_clean()


def test_a_refusing_account_takes_nothing() -> None:
    setup = Setup()

    def refuse(delta_bytes: int) -> None:
        raise OutOfDeviceMemory("the cap")

    arena = VirtualArena(MIB, 100, driver=setup.driver, granularity_bytes=2 * MIB, account=refuse)
    with pytest.raises(OutOfDeviceMemory, match="cap"):
        arena.resize(10)
    assert not setup.bindings.handles
    arena.close()
    setup.require_clean()


def test_a_sixteenth_of_any_cache_can_be_given_back() -> None:
    """What the guard asks for first; at a cache of 16 MiB and more it frees something, however small the cache."""
    for total_bytes in (16 * MIB, 100 * MIB, 700 * MIB, 5 * GIB, 60 * GIB):
        setup = Setup(ScriptedGpu(1, total_bytes=total_bytes + GIB, context_bytes=300 * MIB))
        arena = setup.arena(MIB, total_bytes // MIB)
        arena.resize(arena.max_blocks)
        before_bytes = arena.committed_bytes
        arena.resize(arena.max_blocks - max(2, arena.max_blocks // 16))
        assert 0 < before_bytes - arena.committed_bytes <= before_bytes // 8
        arena.close()


def test_the_device_is_waited_for_before_anything_is_unmapped() -> None:
    setup = Setup()
    arena = setup.arena(HANDLE_BYTES, 8)
    arena.resize(8)
    for size, keep_content in ((5, True), (2, False)):
        poke(setup, arena, 7 if size == 5 else 4, 1)
        arena.resize(size, keep_content=keep_content)  # the driver asserts it
    poke(setup, arena, 1, 1)
    arena.close()
    setup.require_clean()


def test_an_unmap_that_is_refused_is_still_counted() -> None:
    setup = Setup()
    arena = setup.arena(HANDLE_BYTES, 8)
    arena.resize(8)
    setup.gpu.failing["cuMemUnmap"] = [0, 1]
    with pytest.raises(DeviceError):
        arena.resize(2)
    assert arena.committed_blocks == 7
    setup.check(arena)
    arena.close()
    setup.require_clean()


def test_close_goes_on_where_the_device_failed() -> None:
    setup = Setup()
    arena = setup.arena(HANDLE_BYTES, 8)
    arena.resize(8)
    setup.gpu.failing["cuCtxSynchronize"] = [700]
    with pytest.raises(DeviceLost):
        arena.close()
    assert arena.closed
    arena.close()
    setup.require_clean()


def test_addresses_that_are_not_there() -> None:
    setup = Setup()
    setup.gpu.failing["cuMemAddressReserve"] = [OUT_OF_MEMORY]
    with pytest.raises(OutOfDeviceMemory):
        setup.arena(GIB, 1000)
    setup.require_clean()


@pytest.mark.parametrize("lose", [lambda arena: None, lambda arena: arena.resize(3)])
def test_a_dropped_arena_gives_everything_back(lose: Callable[[VirtualArena], None]) -> None:
    setup = Setup()
    arena = setup.arena(300 * MIB, 4)
    lose(arena)
    del arena
    gc.collect()
    setup.require_clean()


def test_two_arenas_share_a_driver() -> None:
    setup = Setup()
    first, second = setup.arena(64 * MIB, 16), setup.arena(16 * MIB, 64)
    for a, b in ((16, 10), (3, 64), (0, 1), (5, 5)):
        first.resize(a)
        second.resize(b)
        setup.check(first, second)
    first.close()
    setup.check(second)
    second.close()
    setup.require_clean()
