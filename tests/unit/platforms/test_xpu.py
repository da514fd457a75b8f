"""The XPU platform over scripted libraries: nothing here has seen the hardware."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from tests.unit.platforms.scripted_xpu import (
    PAGE_BYTES,
    UUID,
    OldXpuRuntime,
    ScriptedLevelZero,
    ScriptedXpu,
    XpuRuntime,
    open_xpu_scripted,
)

from brim.config.schema import DeviceConfig
from brim.errors import DeviceError, DeviceLost, OutOfDeviceMemory
from brim.memory.arena.factory import new_arena
from brim.memory.arena.virtual_arena import VirtualArena
from brim.platforms import level_zero, xpu
from brim.platforms.device_view import HOST, view_at
from brim.platforms.drm_clients import DrmClients
from brim.platforms.level_zero import LevelZero
from brim.platforms.process_share import CONTEXT_BYTES
from brim.units import GIB, MIB
from brim.worker.graph_choice import choose_graph_mode


def test_a_reading_that_moves_is_trusted() -> None:
    opened = open_xpu_scripted(ScriptedXpu(neighbours_bytes=3 * GIB))
    assert opened.device.torch_bytes == 0, "the trial leaves nothing"
    opened.device.torch_bytes += 2 * GIB
    now = opened.platform.reading()
    assert now.trusted and now.free_bytes == opened.device.free_bytes and now.total_bytes == 24 * GIB
    assert now.ours_bytes == CONTEXT_BYTES + 2 * GIB
    capabilities = opened.platform.capabilities
    assert capabilities.trusted_readings and capabilities.over_allocation_kills and capabilities.cap_enforced
    assert (capabilities.arena_backend, capabilities.granularity_bytes, capabilities.dtypes[0]) == (
        "virtual",
        PAGE_BYTES,
        "bfloat16",
    )


def test_free_memory_that_does_not_move_leaves_our_own_account() -> None:
    opened = open_xpu_scripted(ScriptedXpu(reported=20 * GIB))
    now = opened.platform.reading()
    assert not now.trusted and "did not move" in now.reason and not opened.platform.capabilities.trusted_readings
    assert now.free_bytes == 20 * GIB and now.limit_source.startswith("our own account")
    opened.device.torch_bytes += 4 * GIB
    assert opened.platform.reading().free_bytes == 16 * GIB
    opened.device.reported = 5 * GIB  # a neighbour shows in it
    assert opened.platform.reading().free_bytes == 5 * GIB


class TwoCards(DrmClients):
    """The kernel's account of a process that has two cards open and uses the second."""

    def __init__(self, device: ScriptedXpu) -> None:
        self.device = device
        self.beside_bytes = 0  # taken by a library, beside torch's allocator

    def held_bytes(self) -> dict[str, int]:
        ours_bytes = self.device.context_bytes + self.device.torch_bytes + sum(self.device.handles.values())
        return {"0000:03:00.0": 12 * MIB, "0000:04:00.0": ours_bytes + self.beside_bytes}


def test_the_kernels_account_tells_what_is_ours_where_free_memory_stands_still() -> None:
    device = ScriptedXpu(reported=24 * GIB)
    clients = TwoCards(device)
    opened = open_xpu_scripted(device, clients=clients)
    device.torch_bytes += 4 * GIB
    clients.beside_bytes = 120 * MIB
    now = opened.platform.reading()
    assert now.ours_bytes == device.context_bytes + 4 * GIB + 120 * MIB
    assert now.free_bytes == device.total_bytes - now.ours_bytes
    assert not now.trusted and "did not move" in now.reason, "neighbours are still not seen"
    assert opened.platform.describe()["context_known_by"] == "measured"


def test_an_account_of_several_devices_is_not_used_where_nothing_tells_them_apart() -> None:
    device = ScriptedXpu(reported="error")
    opened = open_xpu_scripted(device, clients=TwoCards(device), with_level_zero=False)
    assert opened.platform.reading().ours_bytes == CONTEXT_BYTES


def test_the_cap_is_kept_by_our_own_account_before_memory_is_taken() -> None:
    opened = open_xpu_scripted(ScriptedXpu(reported=20 * GIB))
    arena = new_arena(opened.platform, 2 * MIB, 20_000)
    arena.resize(5_000)
    taken_bytes = sum(opened.device.handles.values())
    assert taken_bytes == arena.committed_bytes == 5_000 * 2 * MIB
    with pytest.raises(OutOfDeviceMemory, match="do not fit"):
        arena.resize(20_000)
    assert sum(opened.device.handles.values()) == taken_bytes, "nothing was tried"
    opened.platform.set_cap(12 * GIB)
    assert opened.runtime.fraction <= (12 * GIB - taken_bytes) / (24 * GIB)
    with pytest.raises(OutOfDeviceMemory, match="cap"):
        arena.resize(6_500)
    arena.close()
    assert not opened.device.handles and not opened.loader.ranges and not opened.loader.mapped


def test_free_memory_that_cannot_be_asked_for() -> None:
    opened = open_xpu_scripted(ScriptedXpu(reported="error"), with_level_zero=False)
    now = opened.platform.reading()
    assert not now.trusted and "cannot be asked for" in now.reason
    assert now.free_bytes == 24 * GIB - CONTEXT_BYTES and now.ours_bytes == CONTEXT_BYTES and now.others_bytes == 0
    assert opened.device.most_taken_bytes == 0, "nothing is taken where nothing is known"


def test_level_zeros_usable_memory_stands_in() -> None:
    opened = open_xpu_scripted(ScriptedXpu(reported="error", usable="true"))
    opened.device.torch_bytes += GIB
    now = opened.platform.reading()
    assert (
        now.trusted and now.free_bytes == opened.device.free_bytes and now.limit_source.startswith("usable memory by Level Zero")
    )


@pytest.mark.parametrize("reported", [-1, 25 * GIB])
def test_absurd_figures_are_not_believed(reported: int) -> None:
    opened = open_xpu_scripted(ScriptedXpu(reported=reported))
    now = opened.platform.reading()
    assert not now.trusted and str(reported) in now.reason and 0 <= now.free_bytes <= now.total_bytes
    later = open_xpu_scripted()
    later.device.reported = reported
    now = later.platform.reading()
    assert not now.trusted and 0 <= now.free_bytes <= 24 * GIB - CONTEXT_BYTES


def test_nothing_is_taken_where_little_is_free() -> None:
    opened = open_xpu_scripted(ScriptedXpu(neighbours_bytes=23 * GIB))
    assert opened.device.most_taken_bytes == 0
    now = opened.platform.reading()
    assert not now.trusted and "too little to try" in now.reason and now.free_bytes == opened.device.free_bytes


def test_an_integrated_device_shares_the_hosts_memory(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {16 * 1024**2} kB\nMemAvailable: {6 * 1024**2} kB\n")
    opened = open_xpu_scripted(ScriptedXpu(reported="error"), tmp_path, is_integrated_gpu=True)
    now = opened.platform.reading()
    assert (now.total_bytes, now.free_bytes) == (16 * GIB, 6 * GIB) and now.limit_source == "memory available on the host"
    limits = opened.platform.default_limits()
    assert limits.memory == "enough" and limits.reserve_bytes == 512 * MIB


def test_torch_without_graphs_says_so() -> None:
    opened = open_xpu_scripted(runtime_class=OldXpuRuntime)
    assert not opened.platform.capabilities.graphs and not opened.platform.capabilities.cap_enforced
    choice = choose_graph_mode(DeviceConfig(), opened.platform.capabilities.graph_modes, opened.platform.reasons["graphs"])
    assert choice.mode == "NONE" and "no torch.xpu.XPUGraph" in choice.reason
    with pytest.raises(DeviceError, match="captures no graphs"), opened.platform.capture():
        pass
    opened.platform.set_cap(12 * GIB)  # our own account keeps it
    with pytest.raises(OutOfDeviceMemory):
        opened.platform.account(13 * GIB)


def test_a_capture_is_ended_and_its_failure_is_no_lost_device() -> None:
    opened = open_xpu_scripted()
    with opened.platform.capture() as graph:
        pass
    graph.replay()
    opened.runtime.graph_fails["end"] = RuntimeError("The sycl_ext_oneapi_graph extension cannot capture this")
    pools = opened.runtime.pools
    with pytest.raises(DeviceError, match="cannot be captured") as raised, opened.platform.capture():
        pass
    assert not isinstance(raised.value, DeviceLost)
    with opened.platform.capture():
        assert opened.runtime.pools == pools + 1
    opened.runtime.graph_fails["begin"] = RuntimeError("level_zero backend failed with error: UR_RESULT_ERROR_DEVICE_LOST")
    with pytest.raises(DeviceLost), opened.platform.capture():
        pass


def test_the_pool_of_a_broken_capture_is_given_up_by_the_calls_that_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_xpu_scripted()
    calls: list[str] = []
    for name in opened.platform.pool_calls:  # torch.xpu.memory does not name them
        monkeypatch.setattr(torch._C, name, lambda *_, name=name: calls.append(name), raising=False)
    opened.runtime.graph_fails["end"] = RuntimeError("The sycl_ext_oneapi_graph extension cannot capture this")
    with pytest.raises(DeviceError), opened.platform.capture():
        pass
    assert calls == ["_xpu_endAllocateToPool", "_xpu_releasePool"]


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ({"context": None}, "context of torch's queues"),
        ({"with_level_zero": False}, "not found in this process"),
        ({"codes": {"zeVirtualMemReserve": 0x78000003}}, "zeVirtualMemReserve: error 0x78000003"),
        ({"codes": {"zePhysicalMemCreate": 0x70000003}}, "not to be had"),
    ],
)
def test_virtual_memory_only_where_it_works(script: dict[str, object], why: str) -> None:
    opened = open_xpu_scripted(**script)  # type: ignore[arg-type]
    assert opened.platform.capabilities.arena_backend == "static" and why in opened.platform.reasons["reserve_commit"]
    assert not opened.loader.ranges and not opened.device.handles
    assert why in str(opened.platform.describe()["virtual_memory"])
    arena = new_arena(opened.platform, 8, 2)
    assert not isinstance(arena, VirtualArena) and opened.platform.memory_view(arena.address, 16).numel() == 16


def test_a_device_that_is_lost_or_not_listed() -> None:
    with pytest.raises(DeviceLost):
        open_xpu_scripted(codes={"zeVirtualMemMap": 0x70000001})
    with pytest.raises(DeviceError, match="does not list"):
        LevelZero("00" * 15 + "01", ScriptedLevelZero(ScriptedXpu()), wait=lambda: None)
    with pytest.raises(DeviceError, match="no zeInit"):
        LevelZero(UUID, object(), wait=lambda: None)


def test_errors_in_the_runtimes_words() -> None:
    platform = open_xpu_scripted().platform
    assert isinstance(platform.as_brim_error(RuntimeError("XPU out of memory. Tried to allocate 1 GiB")), OutOfDeviceMemory)
    assert isinstance(platform.as_brim_error(RuntimeError("error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)")), OutOfDeviceMemory)
    assert isinstance(platform.as_brim_error(RuntimeError("error: 20 (UR_RESULT_ERROR_DEVICE_LOST)")), DeviceLost)
    assert isinstance(platform.as_brim_error(RuntimeError("error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)")), DeviceLost)
    assert platform.as_brim_error(RuntimeError("shapes do not match")) is None


def test_the_peak_is_the_allocators_and_the_arenas() -> None:
    opened = open_xpu_scripted(ScriptedXpu(context_bytes=CONTEXT_BYTES))
    opened.platform.reset_peak()
    held = opened.runtime.zeros(2 * GIB, opened.platform.torch_device())
    del held
    assert opened.platform.peak_ours_bytes() == CONTEXT_BYTES + 2 * GIB
    opened.platform.reset_peak()
    assert opened.platform.peak_ours_bytes() == CONTEXT_BYTES


def test_dtypes_follow_the_properties() -> None:
    assert open_xpu_scripted(has_bfloat16_conversions=False).platform.capabilities.dtypes == ("float16", "float32")
    assert XpuRuntime(ScriptedXpu(), has_fp16=False).get_device_properties(0).has_fp16 is False


def test_memory_at_an_address_is_a_tensor_through_dlpack() -> None:
    memory = (ctypes.c_ubyte * 64)()
    view = view_at(ctypes.addressof(memory), 64, HOST, 0)
    view[3:5] = 7
    shared = view.view(8, 8)
    del view
    assert list(memory[:6]) == [0, 0, 0, 7, 7, 0] and shared.dtype == torch.uint8 and int(shared.sum()) == 14


def test_where_torch_has_no_such_device(tmp_path: Path) -> None:
    if not torch.xpu.is_available():
        with pytest.raises(DeviceError, match="No XPU device"):
            xpu.open_xpu()
    assert not level_zero.is_device_present(tmp_path)
    (tmp_path / "dev/dri").mkdir(parents=True)
    (tmp_path / "dev/dri/renderD128").touch()
    assert level_zero.is_device_present(tmp_path)
