"""Arenas: exactly the committed prefix is resident, content survives, nothing is left behind."""

import ctypes
import errno
import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.config.model_spec import ModelSpec
from brim.errors import OutOfDeviceMemory
from brim.memory.arena.base import Arena
from brim.memory.arena.factory import new_arena, new_arenas
from brim.memory.arena.mmap_arena import HUGE_PAGE_BYTES, MmapArena
from brim.memory.arena.static_arena import Allocation, StaticArena
from brim.memory.arena.view import group_views
from brim.memory.kv_layout import KVGroup, KVLayout
from brim.platforms.cpu import CpuPlatform
from brim.platforms.fake import FakeDevice, FakePlatform
from brim.units import GIB, MIB

LAYOUT = KVLayout(
    groups=(KVGroup("full", (2, 5), 0, 2 * 2 * 4 * 1 * 8 * 4), KVGroup("sliding", (0, 1, 3, 4), 8, 4 * 2 * 4 * 1 * 8 * 4)),
    block_size=4,
    num_kv_heads=1,
    head_dim=8,
    element_bytes=4,
)


def mapped(address: int, num_bytes: int) -> dict[str, int]:
    """Bytes of /proc/self/maps inside the range by permission."""
    found: dict[str, int] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(x, 16) for x in line.split()[0].split("-"))
        size = min(end, address + num_bytes) - max(start, address)
        if size > 0:
            found[line.split()[1]] = found.get(line.split()[1], 0) + size
    return found


def resident_bytes(address: int, num_bytes: int) -> int:
    """Rss of the range from smaps; mappings that reach beyond it must not be resident there."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(x, 16) for x in head.split("-"))
            inside = start < address + num_bytes and end > address
        elif inside and head == "Rss:":
            total += int(line.split()[1]) * 1024
    return total


class Account:
    """Sums what arenas take, and refuses beyond a limit."""

    def __init__(self, limit_bytes: int = 1 << 60) -> None:
        self.held_bytes = 0
        self.limit_bytes = limit_bytes

    def __call__(self, delta_bytes: int) -> None:
        if delta_bytes > 0 and self.held_bytes + delta_bytes > self.limit_bytes:
            raise OutOfDeviceMemory("refused by the account")
        self.held_bytes += delta_bytes
        assert self.held_bytes >= 0


def test_exactly_the_prefix_is_resident() -> None:
    arena = MmapArena(5000, 1000)
    for blocks in (0, 1, 7, 1000, 3, 0, 999):
        arena.resize(blocks)
        expected = -(-blocks * 5000 // mmap.PAGESIZE) * mmap.PAGESIZE
        assert arena.committed_blocks == blocks
        assert arena.committed_bytes == expected
        assert resident_bytes(arena.address, arena.reserved_bytes) == expected
        assert mapped(arena.address, arena.reserved_bytes).get("rw-p", 0) == expected
    arena.close()


def test_huge_pages_never_hold_more_than_is_accounted() -> None:
    arena = MmapArena(300_000, 40, granularity_bytes=HUGE_PAGE_BYTES, huge_pages=True)
    assert arena.address % HUGE_PAGE_BYTES == 0
    for blocks in (1, 20, 40, 5, 7, 0, 40):
        arena.resize(blocks)
        assert resident_bytes(arena.address, arena.reserved_bytes) == arena.committed_bytes
    arena.close()


@pytest.mark.parametrize("huge", [False, True])
def test_close_leaves_no_mapping_and_twice_is_safe(huge: bool) -> None:
    account = Account()
    granularity = HUGE_PAGE_BYTES if huge else mmap.PAGESIZE
    arena = MmapArena(1 << 20, 1 << 14, granularity_bytes=granularity, huge_pages=huge, account=account)
    address, size = arena.address, arena.reserved_bytes
    assert size == 1 << 34
    arena.commit(3)
    assert account.held_bytes == arena.committed_bytes == (4 << 20 if huge else 3 << 20)
    arena.close()
    arena.close()
    assert arena.closed and arena.committed_bytes == 0 and account.held_bytes == 0
    assert mapped(address, size) == {}


def test_dropped_arena_gives_its_range_back() -> None:
    arena = MmapArena(1 << 20, 64)
    address, size = arena.address, arena.reserved_bytes
    arena.commit(64)
    del arena
    assert mapped(address, size) == {}


def poke(arena: Arena, block: int) -> None:
    tag = (block * 2654435761 % 2**32).to_bytes(4, "little")
    memory(arena, block)[:4] = tag
    memory(arena, block)[-4:] = tag


def memory(arena: Arena, block: int) -> memoryview:
    raw = (ctypes.c_ubyte * arena.block_bytes).from_address(arena.address + block * arena.block_bytes)
    return memoryview(raw).cast("B")


def holds(arena: Arena, block: int) -> bool:
    tag = (block * 2654435761 % 2**32).to_bytes(4, "little")
    return bytes(memory(arena, block)[:4]) == tag == bytes(memory(arena, block)[-4:])


@settings(max_examples=60, deadline=None)
@given(
    block_bytes=st.sampled_from([8, 100, 4096, 5000, 12288, 70_000]),
    max_blocks=st.integers(1, 60),
    fractions=st.lists(st.floats(0, 1), max_size=12),
    limit=st.one_of(st.none(), st.integers(0, 60)),
    static=st.booleans(),
)
def test_random_resizes_keep_content_and_account(
    block_bytes: int, max_blocks: int, fractions: list[float], limit: int | None, static: bool
) -> None:
    account = Account()
    arena: Arena
    if static:
        arena = StaticArena(block_bytes, max_blocks, account=account)
        written = set(range(max_blocks))
        for block in written:
            poke(arena, block)
    else:
        arena = MmapArena(block_bytes, max_blocks, account=account)
        written = set()
        if limit is not None:
            account.limit_bytes = arena.bytes_for(min(limit, max_blocks))
    for fraction in fractions:
        target = round(fraction * max_blocks)
        before = arena.committed_blocks
        try:
            arena.resize(target)
        except OutOfDeviceMemory:
            assert arena.bytes_for(target) > account.limit_bytes
            target = before
        assert arena.committed_blocks == target
        assert account.held_bytes == arena.committed_bytes
        survivors = {b for b in written if b < min(before, target)}
        assert all(holds(arena, b) for b in survivors)
        for block in range(target):
            poke(arena, block)
        written = set(range(target))
    arena.close()
    assert account.held_bytes == 0


class RefusingLibc:
    """A C library whose madvise or mprotect fails as scripted."""

    def __init__(self, real: object, failing: str, code: int, times: int = 1 << 30) -> None:
        self._real, self._failing, self._code, self._times = real, failing, code, times

    def __getattr__(self, name: str) -> object:
        def fail(*args: int) -> int:
            populate = name != "madvise" or args[2] == 23
            if not populate or self._times <= 0:
                return int(getattr(self._real, name)(*args))
            self._times -= 1
            ctypes.set_errno(self._code)
            return -1

        return fail if name == self._failing else getattr(self._real, name)


@pytest.mark.parametrize(("failing", "code"), [("madvise", errno.ENOMEM), ("madvise", errno.EFAULT), ("mprotect", errno.ENOMEM)])
def test_memory_that_is_not_there_leaves_the_old_size(failing: str, code: int) -> None:
    account = Account()
    arena = MmapArena(8192, 100, account=account)
    arena.resize(10)
    real = arena._libc
    arena._libc = RefusingLibc(real, failing, code)  # type: ignore[assignment]
    with pytest.raises(OutOfDeviceMemory, match="cannot be backed"):
        arena.resize(50)
    arena._libc = real
    assert arena.committed_blocks == 10
    assert account.held_bytes == resident_bytes(arena.address, arena.reserved_bytes) == 81920
    arena.resize(100)
    assert resident_bytes(arena.address, arena.reserved_bytes) == 819200
    arena.close()


@pytest.mark.parametrize(("code", "times"), [(errno.EINVAL, 1 << 30), (errno.EAGAIN, 3), (errno.EINTR, 2)])
def test_kernels_without_populate_touch_every_page(code: int, times: int) -> None:
    arena = MmapArena(8192, 100)
    arena._libc = RefusingLibc(arena._libc, "madvise", code, times)  # type: ignore[assignment]
    arena.resize(60)
    assert resident_bytes(arena.address, arena.reserved_bytes) == 60 * 8192
    arena.close()


def test_unreservable_range_is_out_of_memory() -> None:
    with pytest.raises(OutOfDeviceMemory, match="reserved"):
        MmapArena(1 << 40, 1 << 20)


def test_static_arena_takes_all_and_gives_nothing_back() -> None:
    account = Account()
    arena = StaticArena(1000, 10, account=account)
    assert not arena.growable and arena.committed_blocks == 10 and account.held_bytes == 10_000
    arena.resize(2)
    assert arena.committed_blocks == 2 and arena.committed_bytes == 10_000
    arena.close()
    arena.close()
    assert account.held_bytes == 0

    def refuse(num_bytes: int) -> Allocation:
        raise OutOfDeviceMemory("no")

    with pytest.raises(OutOfDeviceMemory):
        StaticArena(1000, 10, account=account, allocate=refuse)
    assert account.held_bytes == 0


def views_of(arena: Arena, group: KVGroup) -> list[torch.Tensor]:
    """One view a layer over the whole range."""
    whole = CpuPlatform().memory_view(arena.address, arena.max_blocks * group.block_bytes)
    return group_views(whole, LAYOUT, group, torch.float32)


@pytest.mark.parametrize("group_index", [0, 1])
def test_views_stride_over_the_block(group_index: int) -> None:
    group = LAYOUT.groups[group_index]
    arena = MmapArena(group.block_bytes, 10)
    arena.resize(6)
    views = views_of(arena, group)
    assert len(views) == len(group.layers)
    for view in views:
        assert view.shape == (10, 2, 4, 1, 8)
        assert view[:6].count_nonzero() == 0
    for layer, view in enumerate(views):
        for block in range(6):
            view[block] = 100 * layer + block
    flat = torch.frombuffer(memory(arena, 3), dtype=torch.float32).view(len(views), 2, 4, 1, 8)
    for layer in range(len(views)):
        assert torch.all(flat[layer] == 100 * layer + 3)
    arena.resize(2)
    arena.resize(9)
    assert views[0][1].eq(1).all() and views[-1][8].count_nonzero() == 0
    del views, view
    arena.close()


def test_views_do_not_touch_the_reserved_range() -> None:
    group = LAYOUT.groups[0]
    arena = MmapArena(group.block_bytes, 1 << 22)
    views = views_of(arena, group)
    assert views[1].data_ptr() == arena.address + group.block_bytes // 2
    assert resident_bytes(arena.address, arena.reserved_bytes) == 0
    del views
    arena.close()


def test_factory_follows_capabilities(demo_spec: ModelSpec) -> None:
    cpu = CpuPlatform()
    before = cpu.reading().ours_bytes
    layout = KVLayout.of(demo_spec, 16, 2)
    arenas = new_arenas(cpu, layout, (4096, 600))
    assert all(isinstance(a, MmapArena) for a in arenas)
    arenas[0].resize(1000)
    grown = cpu.reading().ours_bytes - before
    assert abs(grown - arenas[0].committed_bytes) < 4 * MIB
    assert cpu.arena_bytes == arenas[0].committed_bytes
    cpu.set_cap(cpu.reading().ours_bytes + 20 * MIB)
    with pytest.raises(OutOfDeviceMemory, match="cap of"):
        arenas[0].resize(4096)
    for arena in arenas:
        arena.close()
    assert cpu.arena_bytes == 0

    device = FakeDevice(total_bytes=GIB, ours={"context": 100 * MIB})
    fake = FakePlatform(device, reserve_commit=False)
    static = new_arena(fake, 1 << 20, 100)
    assert isinstance(static, StaticArena) and device.ours["arena"] == 100 * MIB
    static.close()
    assert device.ours["arena"] == 0


def test_failed_factory_reserves_nothing() -> None:
    fake = FakePlatform(FakeDevice(total_bytes=300 * MIB, ours={"context": 0}), reserve_commit=False)
    with pytest.raises(OutOfDeviceMemory):
        new_arenas(fake, LAYOUT, (100_000, 300_000))
    assert fake.device.ours_bytes == 0
