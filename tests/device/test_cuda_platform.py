"""The CUDA platform and its arena on a real GPU: readings move by what is taken, the cap holds, nothing is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from brim.errors import DeviceError, OutOfDeviceMemory
from brim.memory.arena.base import Arena
from brim.memory.arena.factory import new_arena
from brim.memory.arena.virtual_arena import VirtualArena
from brim.platforms.cuda import CudaPlatform, open_cuda
from brim.platforms.process_share import MOST_REMAINDER_BYTES
from brim.units import GIB, MIB

pytestmark = [pytest.mark.device, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SLACK_BYTES = 2 * MIB
NEIGHBOUR = """
import sys, torch
held = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").fill_(1)
torch.cuda.synchronize()
print("ok", flush=True)
sys.stdin.readline()
"""
FRESH = """
import json, torch
from brim.platforms.cuda import open_cuda
platform = open_cuda()
found = {"opened": platform.describe()}
with platform.stream():
    x = torch.randn(2048, 2048, device="cuda", dtype=torch.float16)
    y = x @ x
    with platform.capture() as graph:
        y.add_(1)
    graph.replay()
    platform.synchronize()
found["worked"] = platform.describe()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def opened() -> CudaPlatform:
    return open_cuda()


@pytest.fixture
def platform(opened: CudaPlatform) -> Iterator[CudaPlatform]:
    """Nothing cached, no cap, on the platform's stream."""
    with opened.stream():
        opened.synchronize()
        opened.release_unused()
        yield opened
        opened.set_cap(opened.reading().total_bytes)
        opened.synchronize()
        opened.release_unused()


def ours_bytes(platform: CudaPlatform) -> int:
    platform.synchronize()
    return platform.reading().ours_bytes


def tensor(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="cuda").fill_(1)


def growable(platform: CudaPlatform, block_bytes: int, max_blocks: int) -> Arena:
    if not platform.capabilities.reserve_commit:
        pytest.skip("no virtual memory calls here")
    return new_arena(platform, block_bytes, max_blocks)


def test_readings_move_by_what_torch_takes(platform: CudaPlatform) -> None:
    tensor(MIB)  # the first kernel of a process is loaded once
    platform.release_unused()
    before = platform.reading()
    held = tensor(512 * MIB)
    platform.synchronize()
    now = platform.reading()
    assert abs(now.ours_bytes - before.ours_bytes - 512 * MIB) <= SLACK_BYTES
    assert abs(before.free_bytes - now.free_bytes - 512 * MIB) <= SLACK_BYTES
    assert now.total_bytes == before.total_bytes == now.free_bytes + now.ours_bytes + now.others_bytes
    assert now.total_bytes == torch.cuda.mem_get_info()[1]
    del held
    assert abs(platform.release_unused() - 512 * MIB) <= SLACK_BYTES
    assert abs(platform.reading().ours_bytes - before.ours_bytes) <= SLACK_BYTES


def test_a_reading_is_cheap(platform: CudaPlatform) -> None:
    started = time.perf_counter()
    for _ in range(200):
        platform.reading()
    assert (time.perf_counter() - started) / 200 < 1e-3


def test_arenas_take_and_give_back_exactly(platform: CudaPlatform) -> None:
    before_bytes = ours_bytes(platform)
    arena = growable(platform, 3 * MIB, 20_000)
    reserved_bytes = ours_bytes(platform) - before_bytes
    assert reserved_bytes <= SLACK_BYTES
    for blocks in (1, 100, 400, 250, 7, 0, 300):
        arena.resize(blocks, keep_content=False)
        assert arena.committed_bytes == arena.bytes_for(blocks) == platform.arena_bytes
        assert abs(ours_bytes(platform) - before_bytes - arena.committed_bytes) <= SLACK_BYTES
    arena.close()
    assert platform.arena_bytes == 0
    assert abs(ours_bytes(platform) - before_bytes) <= SLACK_BYTES


def test_trying_virtual_memory_out_leaves_nothing(platform: CudaPlatform) -> None:
    if not platform.capabilities.reserve_commit:
        pytest.skip("no virtual memory calls here")
    assert "reserve_commit" not in platform.reasons
    before_bytes = ours_bytes(platform)
    for _ in range(20):
        assert platform.virtual_memory().why_no_virtual_memory() == ""
    assert abs(ours_bytes(platform) - before_bytes) <= SLACK_BYTES


def test_content_survives_and_whole_handles_stay(platform: CudaPlatform) -> None:
    arena = growable(platform, 16 * MIB, 256)
    assert arena.handle_bytes == 64 * MIB
    arena.resize(16)
    view = platform.memory_view(arena.address, arena.max_blocks * arena.block_bytes).view(arena.max_blocks, -1)
    for block in range(16):
        view[block].fill_(block + 1)
    arena.resize(6)
    assert arena.committed_bytes == 2 * arena.handle_bytes and arena.committed_blocks == 8
    arena.resize(20)
    view[8:20].fill_(99)
    for block in range(8):
        assert bool((view[block] == block + 1).all()), block
    assert bool((view[8:20] == 99).all())
    platform.synchronize()
    arena.resize(6, keep_content=False)
    assert arena.committed_blocks == 6
    del view
    arena.close()


def test_a_view_and_a_graph_reach_pages_committed_later(platform: CudaPlatform) -> None:
    arena = growable(platform, 2 * MIB, 1000)
    arena.resize(1)
    view = platform.memory_view(arena.address, arena.max_blocks * arena.block_bytes)
    assert view.numel() == 2000 * MIB and view.data_ptr() == arena.address
    later = view[900 * 2 * MIB : 901 * 2 * MIB]
    view[:16].fill_(1)
    with platform.capture() as graph:
        later.add_(3)
    for _ in range(2):  # committed, and committed again
        arena.resize(1000)
        later.fill_(10)
        graph.replay()
        graph.replay()
        platform.synchronize()
        assert bool((later == 16).all())
        arena.resize(1, keep_content=False)
    del graph, later, view
    arena.close()


def test_torchs_allocator_keeps_the_cap(platform: CudaPlatform) -> None:
    tensor(MIB)
    cap_bytes = ours_bytes(platform) + GIB
    platform.set_cap(cap_bytes)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        tensor(2 * GIB)
    assert isinstance(platform.as_brim_error(caught.value), OutOfDeviceMemory)
    held = []
    try:
        while True:
            held.append(tensor(32 * MIB))
            assert ours_bytes(platform) <= cap_bytes
    except torch.OutOfMemoryError:
        assert cap_bytes - ours_bytes(platform) < 32 * MIB + 2 * SLACK_BYTES
    held.clear()
    platform.release_unused()


def test_arenas_and_the_allocator_share_one_cap(platform: CudaPlatform) -> None:
    arena = growable(platform, 64 * MIB, 64)
    platform.set_cap(ours_bytes(platform) + GIB)
    arena.resize(12)
    with pytest.raises(torch.OutOfMemoryError):
        tensor(512 * MIB)
    with pytest.raises(OutOfDeviceMemory, match="cap"):
        arena.resize(24)
    assert arena.committed_blocks == 12
    arena.resize(0)
    held = tensor(512 * MIB)
    with pytest.raises(OutOfDeviceMemory, match="cap"):
        arena.resize(12)
    del held
    arena.close()


def test_the_peak_sees_what_came_and_went(platform: CudaPlatform) -> None:
    platform.reset_peak()
    before_bytes = ours_bytes(platform)
    tensor(512 * MIB)
    platform.release_unused()
    assert abs(platform.peak_ours_bytes() - before_bytes - 512 * MIB) <= SLACK_BYTES
    platform.reset_peak()
    assert abs(platform.peak_ours_bytes() - before_bytes) <= SLACK_BYTES
    arena = growable(platform, 64 * MIB, 64)
    arena.resize(8)
    arena.close()
    assert abs(platform.peak_ours_bytes() - before_bytes - 512 * MIB) <= SLACK_BYTES
    platform.reset_peak()
    arena = growable(platform, 64 * MIB, 64)
    arena.resize(8)
    tensor(256 * MIB)  # over the arena
    platform.release_unused()
    arena.resize(0)
    tensor(128 * MIB)  # and beside it
    arena.close()
    assert abs(platform.peak_ours_bytes() - before_bytes - 768 * MIB) <= SLACK_BYTES


def test_memory_that_the_driver_does_not_have(platform: CudaPlatform) -> None:
    if not platform.capabilities.reserve_commit or platform.capabilities.over_allocation_kills:
        pytest.skip("not safe here")
    before_bytes = ours_bytes(platform)
    blocks = 2 * platform.reading().total_bytes // GIB
    arena = VirtualArena(GIB, blocks, driver=platform.virtual_memory(), granularity_bytes=platform.capabilities.granularity_bytes)
    arena.resize(1)
    with pytest.raises(OutOfDeviceMemory):
        arena.resize(blocks)
    assert arena.committed_blocks == 1
    assert abs(ours_bytes(platform) - before_bytes - GIB) <= SLACK_BYTES
    arena.close()
    assert abs(ours_bytes(platform) - before_bytes) <= SLACK_BYTES
    with pytest.raises(OutOfDeviceMemory):
        platform.plain_memory(4 * platform.reading().total_bytes)


def test_two_hundred_arenas_leave_nothing(platform: CudaPlatform) -> None:
    def cycle() -> None:
        arena = growable(platform, 2 * MIB, 10_000)
        arena.resize(150)
        view = platform.memory_view(arena.address, 150 * 2 * MIB)
        view.fill_(1)
        arena.resize(20)
        arena.close()

    cycle()  # page tables and the copy kernel's image
    before_bytes = ours_bytes(platform)
    for _ in range(200):
        cycle()
    assert abs(ours_bytes(platform) - before_bytes) <= SLACK_BYTES


def test_another_thread_may_close_an_arena(platform: CudaPlatform) -> None:
    before_bytes = ours_bytes(platform)
    arena = growable(platform, 64 * MIB, 8)
    arena.resize(8)
    thread = threading.Thread(target=arena.close)
    thread.start()
    thread.join()
    assert arena.closed and abs(ours_bytes(platform) - before_bytes) <= SLACK_BYTES


def test_a_static_arena_is_zeroed_and_counted_once(platform: CudaPlatform) -> None:
    backend, can_commit = platform.capabilities.arena_backend, platform.capabilities.reserve_commit
    before_bytes = ours_bytes(platform)
    platform.set_cap(before_bytes + GIB)
    platform.restrict(arena_backend="static", reserve_commit=False)
    try:
        arena = new_arena(platform, 64 * MIB, 8)
        assert abs(ours_bytes(platform) - before_bytes - 512 * MIB) <= SLACK_BYTES
        assert not bool(platform.memory_view(arena.address, 512 * MIB).any())
        with pytest.raises(OutOfDeviceMemory):
            new_arena(platform, 64 * MIB, 16)
        arena.close()
    finally:
        platform.restrict(arena_backend=backend, reserve_commit=can_commit)
    platform.release_unused()
    assert abs(ours_bytes(platform) - before_bytes) <= SLACK_BYTES


def break_capture(platform: CudaPlatform, work: Callable[[torch.Tensor], object]) -> type[BaseException] | None:
    """The kind of error; whatever it holds on to is gone on return."""
    try:
        with platform.capture():
            work(torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda"))
    except Exception as error:
        return type(error)
    return None


def test_a_broken_capture_costs_nothing_and_harms_nothing(platform: CudaPlatform) -> None:
    numbers = torch.zeros(1024, device="cuda")
    numbers.add_(1)
    with platform.capture() as graph:  # shares the pool with the broken ones
        numbers.add_(1)
    before_bytes = ours_bytes(platform)
    for _ in range(3):
        assert break_capture(platform, lambda made: made.sum().item()) is DeviceError
        assert break_capture(platform, lambda made: {}["a bug"]) is KeyError
    with platform.capture() as second:
        numbers.add_(10)
    graph.replay()
    second.replay()
    platform.synchronize()
    assert bool((numbers == 12).all())
    del graph, second  # the first broken capture was in the pool of a graph that lives, which keeps what it once held
    platform.release_unused()
    assert abs(ours_bytes(platform) - before_bytes) <= 3 * SLACK_BYTES
    with pytest.raises(torch.OutOfMemoryError):  # the allocator still gives cached memory back before it refuses
        tensor(4 * platform.reading().total_bytes)


def test_hundreds_of_captures_are_quick(platform: CudaPlatform) -> None:
    numbers = torch.zeros(1024, device="cuda")
    started, graphs = time.perf_counter(), []
    for _ in range(300):
        with platform.capture() as graph:
            numbers.add_(1)
        graphs.append(graph)
    assert time.perf_counter() - started < 3
    for graph in graphs:
        graph.replay()
    platform.synchronize()
    assert bool((numbers == 300).all())


def test_a_neighbour_is_not_ours(platform: CudaPlatform) -> None:
    before = platform.reading()
    child = subprocess.Popen([sys.executable, "-c", NEIGHBOUR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "ok\n"
        now = platform.reading()
    finally:
        child.communicate("\n", timeout=60)
    assert child.returncode == 0
    assert GIB <= before.free_bytes - now.free_bytes <= 3 * GIB
    charged_bytes = now.ours_bytes - before.ours_bytes
    listed = str(platform.describe()["ours_read_from"]).startswith("list")
    assert abs(charged_bytes) <= SLACK_BYTES if listed else 0 <= charged_bytes <= MOST_REMAINDER_BYTES
    assert now.others_bytes - before.others_bytes >= GIB - (0 if listed else MOST_REMAINDER_BYTES)


def test_a_new_process_measures_its_context() -> None:
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    opened, worked = found["opened"], found["worked"]
    print(json.dumps(found, indent=1))
    assert 100 * MIB < opened["context_bytes"] < 2 * GIB
    if opened["free_before_context_bytes"] is not None and not opened["is_slice"]:
        assert opened["context_known_by"] == "measured"
        lost_bytes = opened["free_before_context_bytes"] - opened["free_after_context_bytes"]
        assert abs(lost_bytes - opened["context_bytes"]) <= 64 * MIB
    assert abs(worked["ours_bytes"] - worked["own_account_bytes"]) <= 64 * MIB  # two sources, one truth
