"""The CUDA platform over scripted devices: readings of every kind of device, the cap on the allocator, the peak."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.platforms.scripted_gpu import PID, TOTAL_BYTES, UUID, Opened, ScriptedGpu, ScriptedNvml

from brim.errors import DeviceError, OutOfDeviceMemory
from brim.memory.arena.factory import new_arena
from brim.memory.arena.virtual_arena import VirtualArena
from brim.platforms import cuda
from brim.platforms.cuda import CudaPlatform
from brim.platforms.cuda_driver import CudaDriver
from brim.platforms.nvml import Nvml
from brim.platforms.process_share import CONTEXT_BYTES, MOST_REMAINDER_BYTES
from brim.units import GIB, MIB


def root_with(tmp_path: Path, **files: str) -> Path:
    (tmp_path / "proc").mkdir()
    for name, text in files.items():
        (tmp_path / "proc" / name).write_text(text)
    return tmp_path


def test_a_plain_gpu_is_read_exactly() -> None:
    opened = Opened(ScriptedGpu(PID, neighbours={7: 3 * GIB}))
    opened.require_truth()
    opened.runtime.take(GIB)
    opened.gpu.ours["kernel images"] = 40 * MIB
    opened.gpu.neighbours[8] = 5 * GIB
    opened.require_truth()
    now = opened.platform.reading()
    assert now.others_bytes == 8 * GIB and now.total_bytes == TOTAL_BYTES and now.trusted and now.limit_source == "device"
    del opened.gpu.neighbours[7]
    opened.require_truth()
    capabilities = opened.platform.capabilities
    assert capabilities.arena_backend == "virtual" and capabilities.reserve_commit and capabilities.granularity_bytes == 2 * MIB
    assert not capabilities.host_memory and not capabilities.over_allocation_kills and len(capabilities.graph_modes) == 5
    limits = opened.platform.default_limits()
    assert (limits.memory, limits.max_num_seqs, limits.max_num_batched_tokens) == ("max", 256, 8192)
    assert limits.reserve_bytes == 256 * MIB and opened.platform.torch_device() == torch.device("cuda", 0)


def test_it_describes_itself_in_json() -> None:
    found = Opened().platform.describe()
    assert json.loads(json.dumps(found)) == found
    assert found["ours_read_from"] == "list of processes" and found["uuid"] == UUID and found["driver_cuda"] == "13.0"
    before, after = found["free_before_context_bytes"], found["free_after_context_bytes"]
    assert before - after == found["context_bytes"] == 520 * MIB  # type: ignore[operator]
    assert found["context_known_by"] == "measured" and found["error_correction"] is True
    assert found["ours_bytes"] == found["own_account_bytes"]


def test_a_slice_is_its_own_device() -> None:
    slice_bytes = 9_728 * MIB
    listed = Opened(ScriptedGpu(PID, total_bytes=slice_bytes, uuid_prefix="MIG-", nvml_total_bytes=slice_bytes))
    listed.require_truth()
    assert listed.platform.describe()["is_slice"] is True
    # the library answers for the whole card and lists nobody
    card = ScriptedGpu(PID, total_bytes=slice_bytes, uuid_prefix="MIG-", nvml_total_bytes=TOTAL_BYTES, is_listed=False)
    opened = Opened(card)
    assert opened.platform.reading().total_bytes == slice_bytes
    found = opened.platform.describe()
    assert found["context_bytes"] == CONTEXT_BYTES and found["context_known_by"] == "predicted"
    # and a card's own identifier for a slice of it
    card = ScriptedGpu(PID, total_bytes=slice_bytes, nvml_total_bytes=TOTAL_BYTES, is_listed=False)
    assert Opened(card).platform.describe()["context_known_by"] == "predicted"


@pytest.mark.parametrize("refusing", [{"nvmlInit"}, {"nvmlDeviceGetComputeRunningProcesses"}, {"nvmlDeviceGetMemoryInfo"}, None])
def test_with_less_of_the_management_library(refusing: set[str] | None) -> None:
    opened = Opened(ScriptedGpu(PID, refusing_nvml=refusing or set(), context_bytes=CONTEXT_BYTES), nvml=refusing is not None)
    for owner, num_bytes in (("torch", GIB), ("kernel images", 60 * MIB)):
        opened.gpu.ours[owner] = num_bytes
        opened.require_truth()
    opened.platform.describe()


def test_a_container_that_lists_nobody_uses_our_own_account() -> None:
    opened = Opened(ScriptedGpu(PID, is_listed=False, neighbours={9: GIB}))
    assert opened.platform.describe()["ours_read_from"] == "own account"
    opened.require_truth()
    opened.runtime.take(3 * GIB)
    opened.gpu.ours["graphs"] = 200 * MIB
    opened.require_truth()
    arena = new_arena(opened.platform, 3 * MIB, 1000)
    arena.resize(500)
    opened.require_truth()
    assert "own account" in opened.platform.reading().limit_source
    arena.close()
    opened.require_truth()
    opened.gpu.neighbours[7] = 20 * GIB  # listed: its own
    opened.require_truth()
    opened.gpu.unlisted["hidden"] = 20 * GIB  # not to be told from us: at most a bounded part is charged to us
    now = opened.platform.reading()
    assert opened.gpu.ours_bytes <= now.ours_bytes <= opened.gpu.ours_bytes + MOST_REMAINDER_BYTES
    opened.gpu.unlisted.clear()
    opened.require_truth()


def test_a_neighbour_that_moves_while_the_context_appears_is_not_us() -> None:
    def grow(gpu: ScriptedGpu) -> None:
        gpu.neighbours[7] += 4 * GIB

    for is_listed in (True, False):
        opened = Opened(ScriptedGpu(PID, neighbours={7: GIB}, is_listed=is_listed, on_context=grow))
        opened.require_truth()
        assert opened.platform.describe()["context_bytes"] == 520 * MIB

    def hide(gpu: ScriptedGpu) -> None:
        gpu.unlisted["hidden"] = 30 * GIB

    opened = Opened(ScriptedGpu(PID, is_listed=False, on_context=hide))
    assert opened.platform.describe()["context_bytes"] == CONTEXT_BYTES


def test_we_find_ourselves_under_the_hosts_number() -> None:
    opened = Opened(ScriptedGpu(PID, neighbours={7: GIB}, listed_pid=900_001))
    assert "process 900001 of the host" in str(opened.platform.describe()["ours_read_from"])
    opened.gpu.ours["graphs"] = 300 * MIB
    opened.gpu.neighbours[7] = 9 * GIB
    opened.require_truth()

    def start(gpu: ScriptedGpu) -> None:
        gpu.neighbours[900_002] = 2 * GIB

    both = Opened(ScriptedGpu(PID, listed_pid=900_001, on_context=start))  # two new processes: neither is certain
    assert both.platform.describe()["ours_read_from"] == "own account"


def test_a_strangers_equal_number_is_not_us() -> None:
    opened = Opened(ScriptedGpu(PID, neighbours={PID: 12 * GIB}, is_listed=False))
    assert opened.platform.describe()["ours_read_from"] == "own account"
    opened.require_truth()


def test_a_second_platform_of_the_process_reads_the_same() -> None:
    first = Opened()
    first.runtime.take(GIB)
    again = CudaPlatform(
        runtime=first.runtime,
        nvml=Nvml(UUID, ScriptedNvml(first.gpu)),
        driver=CudaDriver(0, first.bindings),
        root=Path("/nowhere"),
    )
    assert again.reading() == first.platform.reading()
    assert again.describe()["context_bytes"] == 520 * MIB


@pytest.mark.parametrize("hidden", ["failing", "unlisted", "unknown"])
def test_a_library_that_stops_answering_is_replaced_by_our_own_account(hidden: str) -> None:
    opened = Opened()
    opened.runtime.take(2 * GIB)
    if hidden == "failing":
        opened.gpu.refusing_nvml.update({"nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetMemoryInfo"})
    elif hidden == "unknown":
        opened.gpu.unknown_bytes.add(PID)
    else:
        opened.gpu.is_listed = False
    opened.require_truth()
    assert "no longer lists" in opened.platform.reading().reason
    opened.gpu.refusing_nvml.clear()
    opened.gpu.unknown_bytes.clear()
    opened.gpu.is_listed = True
    assert not opened.platform.reading().reason


def test_neighbours_of_unknown_size_do_not_hide_us() -> None:
    opened = Opened(ScriptedGpu(PID, neighbours={7: GIB}, unknown_bytes={7}))
    assert opened.platform.describe()["ours_read_from"] == "list of processes"
    opened.require_truth()


def test_wsl_is_not_trusted_and_has_no_virtual_memory(tmp_path: Path) -> None:
    root = root_with(tmp_path, version="Linux version 6.6.87.2-microsoft-standard-WSL2 (gcc 11)")
    opened = Opened(ScriptedGpu(PID, is_listed=False), root)
    capabilities, now = opened.platform.capabilities, opened.platform.reading()
    assert capabilities.arena_backend == "static" and not capabilities.reserve_commit
    assert capabilities.over_allocation_kills and not capabilities.trusted_readings
    assert not now.trusted and "WSL" in now.reason


def test_an_integrated_device_shares_the_hosts_memory(tmp_path: Path) -> None:
    root = root_with(tmp_path, meminfo="MemTotal:       65536000 kB\nMemAvailable:    4194304 kB\n")
    gpu = ScriptedGpu(PID, total_bytes=60 * GIB, refusing_nvml={"nvmlInit"}, context_bytes=CONTEXT_BYTES)
    opened = Opened(gpu, root, is_integrated=1)
    now = opened.platform.reading()
    assert now.free_bytes == 4 * GIB and "host" in now.limit_source
    gpu.unlisted["page cache"] = 50 * GIB  # moves what CUDA calls free, and is not ours
    now = opened.platform.reading()
    assert now.ours_bytes == CONTEXT_BYTES and now.free_bytes == 4 * GIB
    gpu.unlisted["page cache"] = 58 * GIB  # the kernel gives it back to whoever allocates
    assert opened.platform.reading().free_bytes == 4 * GIB
    limits = opened.platform.default_limits()
    assert limits.memory == "enough" and limits.reserve_bytes == 512 * MIB
    assert opened.platform.capabilities.over_allocation_kills and not opened.platform.capabilities.host_memory


def test_a_control_group_bounds_an_integrated_device(tmp_path: Path) -> None:
    root = root_with(tmp_path, meminfo="MemAvailable:   40000000 kB\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (root / "proc/self").mkdir()
    (root / "proc/self/cgroup").write_text("0::/\n")
    (group / "cgroup.controllers").write_text("memory\n")
    (group / "memory.max").write_text(str(8 * GIB))
    (group / "memory.current").write_text(str(3 * GIB))
    opened = Opened(ScriptedGpu(PID, total_bytes=60 * GIB), root, is_integrated=1)
    assert opened.platform.reading().free_bytes == 5 * GIB


@pytest.mark.parametrize(
    ("driver", "supported", "major", "backend", "first"),
    [(True, 1, 9, "virtual", "bfloat16"), (True, 0, 7, "static", "float16"), (False, 1, 8, "static", "bfloat16")],
)
def test_capabilities_follow_the_driver(driver: bool, supported: int, major: int, backend: str, first: str) -> None:
    attributes = {"CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED": supported}
    capabilities = Opened(ScriptedGpu(PID, attributes=attributes), driver=driver, major=major).platform.capabilities
    assert (capabilities.arena_backend, capabilities.dtypes[0]) == (backend, first)
    assert capabilities.reserve_commit == (backend == "virtual")


@settings(max_examples=40, deadline=None)
@given(
    is_listed=st.booleans(),
    takes=st.lists(st.tuples(st.sampled_from(["torch", "arena", "images"]), st.integers(1, 3000)), max_size=12),
    cap_mib=st.integers(1500, 20_000),
)
def test_no_order_of_taking_passes_the_cap(is_listed: bool, takes: list[tuple[str, int]], cap_mib: int) -> None:
    opened = Opened(ScriptedGpu(PID, is_listed=is_listed, neighbours={7: 20 * GIB}))
    cap_bytes = cap_mib * MIB
    opened.platform.set_cap(cap_bytes)
    arena = new_arena(opened.platform, 2 * MIB, 20_000)
    for owner, mib in takes:
        before_bytes = opened.gpu.ours_bytes
        room_bytes = cap_bytes - before_bytes
        if owner == "torch":
            fits = opened.runtime.take(mib * MIB)
            needed_bytes = -(-mib // 2) * 2 * MIB
            assert fits == (needed_bytes <= room_bytes // (2 * MIB) * 2 * MIB)
        elif owner == "arena":
            try:
                arena.resize(min(20_000, arena.committed_blocks + mib))
            except OutOfDeviceMemory:
                assert 2 * mib * MIB > room_bytes and opened.gpu.ours_bytes == before_bytes
        elif mib * MIB <= min(room_bytes, 64 * MIB):
            opened.gpu.ours["images"] = opened.gpu.ours.get("images", 0) + mib * MIB
            opened.platform.reset_peak()  # a phase begins
        assert opened.gpu.ours_bytes <= cap_bytes
        opened.require_truth()
        assert opened.platform.peak_ours_bytes() >= opened.gpu.ours_bytes
    arena.close()
    opened.require_truth()


def test_the_allowance_never_falls_below_what_is_held() -> None:
    opened = Opened()
    opened.runtime.take(6 * GIB)
    opened.platform.set_cap(GIB)
    allowed_bytes = int(opened.runtime.fraction * opened.gpu.total_bytes)
    assert 6 * GIB <= allowed_bytes < 6 * GIB + 2 * MIB
    opened.platform.set_cap(1 << 60)
    assert opened.runtime.fraction == 1.0


@pytest.mark.parametrize("is_listed", [True, False])
def test_the_allowance_follows_arenas_and_libraries_exactly(is_listed: bool) -> None:
    opened = Opened(ScriptedGpu(PID, is_listed=is_listed, neighbours={7: 20 * GIB}))
    opened.platform.set_cap(10 * GIB)
    arena = new_arena(opened.platform, 2 * MIB, 5000)
    arena.resize(2000)
    opened.gpu.ours["images"] = 100 * MIB
    opened.platform.reset_peak()  # a phase begins: what libraries took is the allocator's no more
    room_bytes = 10 * GIB - opened.gpu.ours_bytes
    assert not opened.runtime.take(room_bytes + 2 * MIB)
    assert opened.runtime.take(room_bytes - 2 * MIB)
    opened.gpu.ours["torch"] = 0
    for blocks in (2500, 1000):
        arena.resize(blocks, keep_content=False)
        room_bytes = 10 * GIB - opened.gpu.ours_bytes
        assert not opened.runtime.take(room_bytes + 2 * MIB)
        assert opened.runtime.take(room_bytes - 2 * MIB)
        opened.gpu.ours["torch"] = 0
    arena.close()


def test_the_peak_sees_what_came_and_went() -> None:
    opened = Opened()
    opened.runtime.take(GIB)
    opened.platform.reset_peak()
    held_bytes = opened.gpu.ours_bytes
    assert opened.platform.peak_ours_bytes() == held_bytes
    opened.runtime.take(2 * GIB)
    opened.gpu.ours["torch"] -= 2 * GIB  # given back between two readings
    assert opened.platform.peak_ours_bytes() == held_bytes + 2 * GIB
    opened.platform.reset_peak()
    arena = new_arena(opened.platform, 64 * MIB, 100)
    arena.resize(48)
    arena.resize(0, keep_content=False)
    assert opened.platform.peak_ours_bytes() == held_bytes + 3 * GIB
    opened.platform.reset_peak()
    assert opened.platform.peak_ours_bytes() == held_bytes
    opened.gpu.ours["graphs"] = 100 * MIB  # never in the allocator's own figures
    opened.platform.reading()
    opened.gpu.ours["graphs"] = 0
    assert opened.platform.peak_ours_bytes() == held_bytes + 100 * MIB
    assert opened.platform.release_unused() == GIB
    arena.close()


@settings(max_examples=60, deadline=None)
@given(
    is_listed=st.booleans(),
    moves=st.lists(st.tuples(st.sampled_from(["torch", "arena"]), st.integers(0, 60), st.booleans()), max_size=12),
)
def test_the_peak_is_exact_in_any_order(is_listed: bool, moves: list[tuple[str, int, bool]]) -> None:
    opened = Opened(ScriptedGpu(PID, is_listed=is_listed, neighbours={7: 20 * GIB}))
    arena = new_arena(opened.platform, 64 * MIB, 64)
    opened.platform.reset_peak()
    peak_bytes = opened.gpu.ours_bytes
    for owner, size, begins_a_phase in moves:
        if begins_a_phase:
            opened.platform.reset_peak()
            peak_bytes = opened.gpu.ours_bytes
        if owner == "arena":
            arena.resize(size, keep_content=False)
            peak_bytes = max(peak_bytes, opened.gpu.ours_bytes)
        else:  # taken and given back between two readings
            opened.runtime.take(size * 64 * MIB)
            peak_bytes = max(peak_bytes, opened.gpu.ours_bytes)
            opened.gpu.ours["torch"] = size * 2 * MIB
        peak_bytes = max(peak_bytes, opened.gpu.ours_bytes)
    assert opened.platform.peak_ours_bytes() == peak_bytes
    arena.close()


def test_the_factory_builds_the_drivers_arena() -> None:
    opened = Opened()
    arena = new_arena(opened.platform, 5 * MIB, 100)
    assert isinstance(arena, VirtualArena)
    arena.resize(3)
    assert opened.platform.arena_bytes == arena.committed_bytes == 16 * MIB == opened.gpu.ours["arena"]
    with pytest.raises(OutOfDeviceMemory):
        opened.platform.set_cap(opened.ours_bytes + 10 * MIB)
        arena.resize(100)
    arena.close()
    assert opened.platform.arena_bytes == 0 == opened.gpu.ours["arena"] and not opened.bindings.ranges


def test_torch_without_cuda_is_no_device() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(DeviceError, match="No CUDA device"):
        cuda.open_cuda()


def test_without_a_driver_nothing_is_imported_to_find_that_out() -> None:
    code = (
        "import sys\nfrom brim.platforms.cuda_driver import is_driver_installed\nfrom brim.platforms.detect import detect\n"
        "name = detect('auto').name\nassert is_driver_installed() or (name, 'torch' in sys.modules) == ('cpu', False), name"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
