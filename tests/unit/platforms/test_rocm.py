"""The ROCm platform over scripted libraries: nothing here has seen the hardware."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.unit.platforms.scripted_gpu import PID, TOTAL_BYTES, ScriptedGpu
from tests.unit.platforms.scripted_hip import BUS_ID, UNIT_BYTES, ScriptedAmdsmi, ScriptedHip, open_scripted

from brim.errors import DeviceError, DeviceLost, OutOfDeviceMemory
from brim.memory.arena.factory import new_arena
from brim.memory.arena.virtual_arena import VirtualArena
from brim.platforms import hip_driver, rocm
from brim.platforms.amdsmi import Amdsmi
from brim.platforms.hip_driver import HipDriver
from brim.units import GIB, MIB


def test_a_card_is_read_exactly_and_neighbours_are_theirs() -> None:
    opened = open_scripted(ScriptedGpu(PID, neighbours={7: 3 * GIB}))
    opened.runtime.take(GIB)
    opened.gpu.ours["kernel images"] = 40 * MIB
    opened.gpu.neighbours[8] = 5 * GIB
    now = opened.platform.reading()
    assert (now.free_bytes, now.ours_bytes, now.others_bytes) == (opened.gpu.free_bytes, opened.gpu.ours_bytes, 8 * GIB)
    assert now.trusted and now.total_bytes == TOTAL_BYTES and now.limit_source == "device"
    assert opened.platform.capabilities.arena_backend == "virtual" and opened.platform.capabilities.graphs
    assert opened.platform.capabilities.dtypes[0] == "bfloat16" and not opened.platform.capabilities.over_allocation_kills
    described = opened.platform.describe()
    assert (described["architecture"], described["driver"], described["virtual_memory"]) == ("gfx942", "6.16.6", "works")


def test_the_cap_holds_arena_and_allocator_together() -> None:
    opened = open_scripted()
    opened.platform.set_cap(10 * GIB)
    arena = new_arena(opened.platform, UNIT_BYTES, 5000)
    assert isinstance(arena, VirtualArena)
    arena.resize(2000)
    assert opened.hip.accessible and opened.gpu.ours["handles"] == arena.committed_bytes
    assert not opened.runtime.take(10 * GIB - opened.gpu.ours_bytes + 4 * MIB)
    with pytest.raises(OutOfDeviceMemory, match="cap"):
        arena.resize(5000)
    arena.close()
    assert not opened.hip.mapped and not opened.hip.handles and not opened.hip.ranges


@pytest.mark.parametrize("lie_bytes", [-5, TOTAL_BYTES + GIB, int(1.33 * GIB)])
def test_free_memory_that_the_driver_contradicts_is_not_trusted(lie_bytes: int) -> None:
    opened = open_scripted(ScriptedGpu(PID, neighbours={7: 3 * GIB}))
    opened.runtime.free_bytes = lie_bytes
    now = opened.platform.reading()
    assert not now.trusted and "HIP says" in now.reason and now.free_bytes == opened.gpu.free_bytes
    assert now.others_bytes == 3 * GIB and now.limit_source == "the driver's account"


def test_absurd_figures_without_a_library_leave_our_own_account() -> None:
    opened = open_scripted(with_library=False)
    opened.runtime.take(4 * GIB)
    opened.runtime.free_bytes = -1
    now = opened.platform.reading()
    assert not now.trusted and now.free_bytes == TOTAL_BYTES - 4 * GIB and 0 <= now.ours_bytes <= 5 * GIB
    assert now.others_bytes >= 0 and "own account" in now.limit_source


def test_without_a_library_neighbours_that_shrink_are_not_ours() -> None:
    opened = open_scripted(ScriptedGpu(PID, neighbours={7: 3 * GIB}), with_library=False)
    opened.gpu.neighbours.clear()
    assert opened.platform.reading().ours_bytes < GIB and opened.platform.reading().trusted
    assert opened.platform.describe()["context_known_by"] == "predicted"


def test_a_partition_does_not_use_the_whole_cards_figures() -> None:
    gpu = ScriptedGpu(PID, total_bytes=24 * GIB)
    opened = open_scripted(gpu, smi_total_bytes=192 * GIB)
    now = opened.platform.reading()
    assert now.total_bytes == 24 * GIB and now.free_bytes == gpu.free_bytes and now.trusted
    assert opened.platform.describe()["ours_read_from"] == "own account"


def test_a_list_that_shows_less_than_torch_holds_is_not_used() -> None:
    opened = open_scripted()
    opened.amdsmi.listed = [{"pid": PID, "mem": 4096, "memory_usage": {"vram_mem": 4096}}]
    opened.runtime.take(2 * GIB)
    now = opened.platform.reading()
    assert now.ours_bytes >= 2 * GIB and "no longer lists" in now.reason


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (["handle"], None),
        ("N/A", None),
        ([{"pid": 5, "mem": "N/A", "memory_usage": {"vram_mem": "N/A"}}], {}),
        ([{"pid": 5, "mem": 9, "memory_usage": {"vram_mem": 0}}], {5: 9}),
        ([{"pid": 5, "mem": 9, "memory_usage": {"vram_mem": 7, "gtt_mem": 2}}, {"pid": "N/A", "mem": 3}], {5: 7}),
    ],
)
def test_what_the_library_lists(answer: object, found: object) -> None:
    assert Amdsmi(BUS_ID, ScriptedAmdsmi(ScriptedGpu(PID), listed=answer)).process_bytes() == found


def test_a_library_that_refuses_says_nothing() -> None:
    gpu = ScriptedGpu(PID)
    assert not Amdsmi(BUS_ID, ScriptedAmdsmi(gpu, refusing={"amdsmi_init"})).works
    assert not Amdsmi("0000:99:00.0", ScriptedAmdsmi(gpu)).works, "another device's figures are not ours"
    assert not Amdsmi("", ScriptedAmdsmi(gpu)).works and Amdsmi("", ScriptedAmdsmi(gpu, handles=("x",))).works
    silent = Amdsmi(BUS_ID, ScriptedAmdsmi(gpu, refusing={"amdsmi_get_gpu_memory_usage", "amdsmi_get_gpu_process_list"}))
    assert silent.works and silent.free_bytes() is None and silent.process_bytes() is None
    assert Amdsmi(BUS_ID, object()).driver_version() is None


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ({"hip_version": 70_253_211}, "7.12 or newer"),
        ({"hip_supported": 0}, "no virtual memory"),
        ({"hip_codes": {"hipMemSetAccess": 1}}, "hipMemSetAccess: error 1"),
        ({"hip_codes": {"hipMemCreate": 2}}, "not to be had"),
        ({"hip_codes": {"hipRuntimeGetVersion": 3}}, "hipRuntimeGetVersion"),
        ({"with_driver": False}, "not found in this process"),
    ],
)
def test_virtual_memory_only_where_it_is_known_to_work(script: dict[str, object], why: str) -> None:
    opened = open_scripted(**script)  # type: ignore[arg-type]
    capabilities = opened.platform.capabilities
    assert (capabilities.arena_backend, capabilities.reserve_commit) == ("static", False)
    assert why in opened.platform.reasons["reserve_commit"] and why in str(opened.platform.describe()["virtual_memory"])
    assert not opened.hip.ranges and not opened.hip.mapped and not opened.hip.handles, "the trial leaves nothing"


def test_a_lost_device_is_said_to_be_lost() -> None:
    with pytest.raises(DeviceLost, match="hipMemCreate says 700"):
        open_scripted(hip_codes={"hipMemCreate": 700})
    with pytest.raises(DeviceError, match="no hipMemMap"):
        HipDriver(0, object()).map(1 << 40, UNIT_BYTES, None)
    driver = HipDriver(0, ScriptedHip(ScriptedGpu(PID), version=70_253_211))
    assert driver.version() == (7, 2) and driver.bus_id() == BUS_ID


@pytest.mark.parametrize("properties", [{"is_integrated": 1}, {"gcnArchName": "gfx1151"}])
def test_an_apu_shares_the_hosts_memory(tmp_path: Path, properties: dict[str, object]) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {64 * 1024**2} kB\nMemAvailable: {6 * 1024**2} kB\n")
    opened = open_scripted(root=tmp_path, **properties)
    now = opened.platform.reading()
    assert now.free_bytes == 6 * GIB and now.limit_source == "memory available on the host"
    assert opened.platform.capabilities.over_allocation_kills and opened.platform.default_limits().memory == "enough"
    assert opened.platform.default_limits().reserve_bytes == 512 * MIB


def test_wsl_spills_and_has_no_virtual_memory(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/version").write_text("Linux version 6.6 (Microsoft@WSL2)")
    platform = open_scripted(root=tmp_path).platform
    assert not platform.reading().trusted and "spills" in platform.reading().reason
    assert not platform.capabilities.reserve_commit and platform.capabilities.over_allocation_kills


@pytest.mark.parametrize(
    ("arch", "first"), [("gfx1030", "float16"), ("gfx906", "float16"), ("gfx1201", "bfloat16"), ("gfx90a", "bfloat16")]
)
def test_dtypes_follow_the_processor(arch: str, first: str) -> None:
    assert open_scripted(gcnArchName=arch).platform.capabilities.dtypes[0] == first


def test_errors_in_hips_words() -> None:
    platform = open_scripted().platform
    assert isinstance(platform.as_brim_error(RuntimeError("HIP error: out of memory")), OutOfDeviceMemory)
    assert isinstance(platform.as_brim_error(RuntimeError("HIPBLAS_STATUS_ALLOC_FAILED when calling")), OutOfDeviceMemory)
    assert isinstance(platform.as_brim_error(RuntimeError("HIP error: an illegal memory access was encountered")), DeviceLost)
    stopped = platform.as_brim_error(RuntimeError("HIP error: operation not permitted when stream is capturing"))
    assert isinstance(stopped, DeviceError) and not isinstance(stopped, DeviceLost)
    assert platform.as_brim_error(RuntimeError("shapes do not match")) is None


def test_where_torch_has_no_such_device(tmp_path: Path) -> None:
    if torch.version.hip is None:
        with pytest.raises(DeviceError, match="No ROCm device"):
            rocm.open_rocm()
    assert not hip_driver.is_device_present(tmp_path) and hip_driver.loaded_runtime(tmp_path) is None
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    assert hip_driver.is_device_present(tmp_path)
