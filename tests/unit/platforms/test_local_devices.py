"""The list of accelerators by scripted libraries: every figure may be missing, and processes may not be to be seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.unit.platforms.scripted_gpu import CARVED_OUT_BYTES, TOTAL_BYTES, ScriptedGpu, ScriptedNvml
from tests.unit.platforms.scripted_gpu import UUID as NVIDIA_UUID
from tests.unit.platforms.scripted_hip import ScriptedAmdsmi
from tests.unit.platforms.scripted_xpu import ScriptedLevelZero, ScriptedXpu
from tests.unit.platforms.test_drm_clients import CARD, XE

from brim.platforms.local_devices import DeviceProcess, LocalDevice, amdsmi_devices, level_zero_devices, nvml_devices
from brim.units import GIB, MIB


class ManyCards(ScriptedNvml):
    """pynvml with the calls that list cards; all of them are the same one."""

    def nvmlDeviceGetCount(self) -> int:
        self._check("nvmlDeviceGetCount")
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> Any:
        return f"GPU-{NVIDIA_UUID}" if handle else f"GPU-{NVIDIA_UUID}".encode()

    def nvmlDeviceGetName(self, handle: str) -> Any:
        self._check("nvmlDeviceGetName")
        return b"NVIDIA H100"


def process(root: Path, pid: int, name: str, parent: int) -> None:
    folder = root / f"proc/{pid}"
    folder.mkdir(parents=True)
    (folder / "comm").write_text(f"{name}\n")
    (folder / "status").write_text(f"Name:\t{name}\nPid:\t{pid}\nPPid:\t{parent}\n")


def test_cards_and_their_neighbours_largest_first(tmp_path: Path) -> None:
    process(tmp_path, 8, "python3", 4)
    gpu = ScriptedGpu(1, neighbours={7: GIB, 8: 2 * GIB})
    first, second = nvml_devices(ManyCards(gpu), tmp_path)
    total_bytes = TOTAL_BYTES + CARVED_OUT_BYTES
    held = (DeviceProcess(8, 2 * GIB, "python3", 4), DeviceProcess(7, GIB))
    assert first == LocalDevice("cuda", 0, "NVIDIA H100", total_bytes, gpu.free_bytes, held)
    assert second.index == 1
    assert first.used_bytes == total_bytes - gpu.free_bytes
    assert first.unnamed_bytes == first.used_bytes - 3 * GIB


@pytest.mark.parametrize(
    ("refusing", "known"),
    [
        ("nvmlInit", None),
        ("nvmlDeviceGetCount", None),
        ("nvmlDeviceGetComputeRunningProcesses", {"processes": None}),
        ("nvmlDeviceGetMemoryInfo", {"total_bytes": None, "free_bytes": None, "used_bytes": None, "unnamed_bytes": None}),
        ("nvmlDeviceGetName", {"name": "?"}),
    ],
)
def test_a_call_that_is_refused_leaves_its_figure_out(refusing: str, known: dict[str, Any] | None, tmp_path: Path) -> None:
    found = list(nvml_devices(ManyCards(ScriptedGpu(1, refusing_nvml={refusing})), tmp_path))
    assert bool(found) is (known is not None)
    assert all(getattr(found[0], name) == value for name, value in (known or {}).items())


def test_amd_cards(tmp_path: Path) -> None:
    gpu = ScriptedGpu(1, neighbours={7: GIB})
    library = ScriptedAmdsmi(gpu)
    first, _ = amdsmi_devices(library, tmp_path)
    assert (first.platform, first.name, first.total_bytes) == ("rocm", "?", gpu.total_bytes)
    assert first.processes == (DeviceProcess(7, GIB),)
    library.amdsmi_get_gpu_asic_info = lambda handle: {"market_name": "AMD Instinct MI300X"}  # type: ignore[attr-defined]
    assert next(amdsmi_devices(library, tmp_path)).name == "AMD Instinct MI300X"
    assert not list(amdsmi_devices(ScriptedAmdsmi(gpu, refusing={"amdsmi_init"}), tmp_path))


class OneCard(ScriptedLevelZero):
    """The loader of a machine with one device."""

    def _zeDeviceGet(self, driver: Any, count: Any, handles: Any) -> None:
        count._obj.value = 1
        if handles is not None:
            handles[0] = 22


def test_intel_devices_say_what_is_free_and_the_kernel_who_holds(tmp_path: Path) -> None:
    process(tmp_path, 9, "python3", 4)
    for name in ("fd", "fdinfo"):
        (tmp_path / f"proc/9/{name}").mkdir()
    (tmp_path / "proc/9/fd/5").symlink_to("/dev/dri/renderD128")
    (tmp_path / "proc/9/fdinfo/5").write_text(XE.format(client=3, device=CARD, total=2048, resident=1024))
    xpu = ScriptedXpu(usable="true")
    (found,) = level_zero_devices(OneCard(xpu), tmp_path)
    assert found == LocalDevice("xpu", 0, "?", None, xpu.free_bytes, (DeviceProcess(9, MIB, "python3", 4),))
    assert (found.used_bytes, found.unnamed_bytes) == (None, None)
    both = list(level_zero_devices(ScriptedLevelZero(xpu), tmp_path))
    assert [one.processes for one in both] == [None, None]
    assert not list(level_zero_devices(OneCard(xpu, codes={"zeInit": 0x78000001}), tmp_path))
