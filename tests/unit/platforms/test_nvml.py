"""The management library over a scripted one: every figure may be missing, and what its list says of us and of neighbours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.platforms.scripted_gpu import CARVED_OUT_BYTES, PID, TOTAL_BYTES, UUID, Opened, ScriptedGpu, ScriptedNvml

from brim.platforms.nvml import Nvml
from brim.platforms.process_share import CONTEXT_BYTES, MOST_REMAINDER_BYTES
from brim.units import GIB, MIB

LIST = "nvmlDeviceGetComputeRunningProcesses"
CALLS = ("nvmlInit", LIST, "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetEccMode")


def test_what_it_says_of_a_card() -> None:
    gpu = ScriptedGpu(PID, neighbours={7: GIB, 8: 2 * GIB}, unknown_bytes={8})
    gpu.make_context()
    nvml = Nvml(UUID, ScriptedNvml(gpu))
    assert nvml.works and not nvml.is_slice
    assert nvml.free_bytes() == gpu.free_bytes and nvml.process_bytes() == {7: GIB, PID: 520 * MIB}
    assert (nvml.driver_version(), nvml.cuda_version(), nvml.error_correction()) == ("580.65.06", "13.0", True)


@pytest.mark.parametrize("total_bytes", [TOTAL_BYTES, TOTAL_BYTES + CARVED_OUT_BYTES])
def test_a_slice_is_not_the_card(total_bytes: int) -> None:
    gpu = ScriptedGpu(PID)
    assert Nvml(UUID, ScriptedNvml(gpu)).is_of(total_bytes)
    for share in (2, 4, 7):
        assert not Nvml(UUID, ScriptedNvml(gpu)).is_of(total_bytes // share)
    gpu.uuid_prefix = "MIG-"
    assert Nvml(UUID, ScriptedNvml(gpu)).is_slice


@pytest.mark.parametrize("refusing", [{name} for name in CALLS] + [set(CALLS)])
def test_a_figure_that_cannot_be_had_is_none(refusing: set[str]) -> None:
    nvml = Nvml(UUID, ScriptedNvml(ScriptedGpu(PID, refusing_nvml=refusing)))
    works = "nvmlInit" not in refusing
    assert nvml.works is works
    assert (nvml.process_bytes() is None) == (not works or LIST in refusing)
    assert (nvml.free_bytes() is None) == (not works or "nvmlDeviceGetMemoryInfo" in refusing)
    assert (nvml.error_correction() is None) == (not works or "nvmlDeviceGetEccMode" in refusing)
    assert nvml.is_of(TOTAL_BYTES) == (nvml.free_bytes() is not None)


def test_a_device_that_it_does_not_know() -> None:
    nvml = Nvml("another", ScriptedNvml(ScriptedGpu(PID)))
    assert not nvml.works and nvml.process_bytes() is None and nvml.free_bytes() is None and not nvml.is_of(TOTAL_BYTES)


def test_an_older_library_writes_bytes_and_a_process_may_be_listed_twice() -> None:
    class Older(ScriptedNvml):
        def nvmlSystemGetDriverVersion(self) -> Any:
            return b"470.82"

        def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
            return [SimpleNamespace(pid=5, usedGpuMemory=held) for held in (GIB, None, MIB)]

    nvml = Nvml(UUID, Older(ScriptedGpu(PID)))
    assert nvml.driver_version() == "470.82" and nvml.process_bytes() == {5: GIB + MIB}


MOVES = st.lists(
    st.tuples(st.sampled_from(["torch", "images", "listed", "listed", "new", "hidden"]), st.integers(-4096, 4096)), max_size=15
)


def move(opened: Opened, moves: list[tuple[str, int]]) -> bool:
    """Play them on the device, as far as it has room. True where only what is listed, or ours, has moved."""
    gpu, all_known = opened.gpu, True
    for number, (who, mib) in enumerate(moves):
        grow_bytes = min(mib * MIB, gpu.free_bytes)
        if who == "torch":
            gpu.ours["torch"] = max(0, gpu.ours.get("torch", 0) + grow_bytes)
        elif who == "images":
            gpu.ours["images"] = min(200 * MIB, gpu.ours.get("images", 0) + abs(grow_bytes) // 40)
        elif who == "listed":
            gpu.neighbours[7] = max(MIB, gpu.neighbours[7] + grow_bytes)
        elif who == "new" and grow_bytes > 0:
            gpu.neighbours[100 + number] = grow_bytes
        elif who == "hidden":
            gpu.unlisted["hidden"] = max(0, gpu.unlisted["hidden"] + grow_bytes)
            all_known = False
    return all_known


@settings(max_examples=80, deadline=None)
@given(moves=MOVES, listed_pid=st.sampled_from([None, 900_001]))
def test_with_the_list_nothing_of_a_neighbour_is_ever_ours(moves: list[tuple[str, int]], listed_pid: int | None) -> None:
    opened = Opened(ScriptedGpu(PID, listed_pid=listed_pid, neighbours={7: 8 * GIB}, unlisted={"hidden": 4 * GIB}))
    move(opened, moves)
    opened.require_truth()


@settings(max_examples=80, deadline=None)
@given(moves=MOVES)
def test_without_the_list_we_are_never_less_than_we_hold_ourselves(moves: list[tuple[str, int]]) -> None:
    opened = Opened(ScriptedGpu(PID, is_listed=False, neighbours={7: 8 * GIB}, unlisted={"hidden": 4 * GIB}))
    if move(opened, moves):
        opened.require_truth()
    now, known_bytes = opened.ours_bytes, 520 * MIB + opened.gpu.ours.get("torch", 0)
    assert known_bytes <= now <= known_bytes + MOST_REMAINDER_BYTES


def two_start(gpu: ScriptedGpu) -> None:
    """Somebody else's context appears with ours."""
    gpu.neighbours[900_002] = 2 * GIB


@pytest.mark.parametrize("why", ["two started at once", "the context was there before", "the list came later"])
def test_an_entry_that_may_be_ours_hides_nothing_of_ours(why: str) -> None:
    gpu = ScriptedGpu(PID, listed_pid=900_001, context_bytes=CONTEXT_BYTES, neighbours={7: GIB})
    if why == "two started at once":
        gpu.on_context = two_start
    elif why == "the context was there before":
        gpu.make_context()
    else:
        gpu.refusing_nvml.add(LIST)
    opened = Opened(gpu)
    gpu.refusing_nvml.clear()
    assert opened.platform.describe()["ours_read_from"] == "own account"
    opened.runtime.take(10 * GIB)
    gpu.ours["images"] = 300 * MIB
    opened.require_truth()
    gpu.neighbours[8] = 20 * GIB  # certainly not us, where it can be known
    assert gpu.ours_bytes <= opened.ours_bytes <= gpu.ours_bytes + MOST_REMAINDER_BYTES - 300 * MIB


@pytest.mark.parametrize("is_listed", [True, False])
def test_a_list_that_fails_later_does_not_make_neighbours_ours(is_listed: bool) -> None:
    gpu = ScriptedGpu(PID, is_listed=is_listed, neighbours={7: 20 * GIB})
    opened = Opened(gpu)
    opened.runtime.take(2 * GIB)
    opened.require_truth()
    gpu.refusing_nvml.add(LIST)
    opened.require_truth()
    opened.runtime.take(GIB)
    gpu.ours["images"] = 100 * MIB
    opened.require_truth()
    assert "own account" in opened.platform.reading().limit_source
    gpu.refusing_nvml.clear()
    gpu.neighbours[7] = 30 * GIB
    opened.require_truth()


def test_without_the_library_a_neighbour_is_bounded_both_ways() -> None:
    gpu = ScriptedGpu(PID, context_bytes=CONTEXT_BYTES, unlisted={"hidden": 20 * GIB})
    opened = Opened(gpu, nvml=False)
    opened.runtime.take(3 * GIB)
    opened.require_truth()
    gpu.unlisted["hidden"] = 60 * GIB
    assert opened.ours_bytes == gpu.ours_bytes + MOST_REMAINDER_BYTES
    gpu.unlisted["hidden"] = 0
    assert opened.ours_bytes == gpu.ours_bytes


def test_wsl_without_a_list_charges_no_neighbour_it_cannot_see(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/version").write_text("Linux version 5.15.0-microsoft-standard-WSL2")
    gpu = ScriptedGpu(PID, context_bytes=CONTEXT_BYTES, unlisted={"desktop": 2 * GIB}, refusing_nvml={LIST})
    opened = Opened(gpu, tmp_path)
    opened.require_truth()
    assert "WSL" in opened.platform.reasons["reserve_commit"]
