"""The ROCm platform: one AMD device as this process sees it. Owns which reading is right for the kind of device it is.

    graphics card  total and free from the HIP runtime; ours from the management library's list of processes
    partition      the management library's total is the whole card's: its figures are not used
    APU            memory is the host's: free is the least of HIP's figure, MemAvailable and what control groups leave
    WSL            no list and no virtual memory calls; over-allocation spills to the host instead of failing: untrusted

HIP's free memory has been wrong by many GiB in the field, so where the management library knows the same device and the two
differ by a tenth of it, the driver's figure is taken and the reading says that it is not trusted. A list that shows less
than torch alone holds is not used. Written against the documentation; never run on the hardware.
Source: HIP runtime API hipMemGetInfo; torch.cuda on HIP; AMD SMI; "User Guide for AMDGPU Backend", table of processors.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from brim.errors import DeviceError
from brim.platforms.amdsmi import Amdsmi
from brim.platforms.base import Capabilities
from brim.platforms.hip_driver import HipDriver, loaded_runtime
from brim.platforms.process_share import ProcessShare
from brim.platforms.torch_platform import ALL_MODES, DeviceMemory, TorchPlatform, Zeros, torch_zeros
from brim.units import MIB, format_bytes

_DISAGREEMENT = 10  # one part of the total
_SPILLS = "under WSL taking too much spills to the host's memory instead of failing"
# Processors that are an APU; newer torch says so itself.
_APUS = ("gfx902", "gfx909", "gfx90c", "gfx1013", "gfx1033", "gfx1035", "gfx1036", "gfx1103", "gfx115")
_NATIVE_BFLOAT16 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")


class RocmPlatform(TorchPlatform):
    """`runtime` is torch.cuda of a HIP build, `library` and `driver` what torch lacks (None: not there); all may be scripted.

    Construction creates the context and measures it. Raises DeviceError where there is no such device.
    """

    name = "rocm"

    def __init__(
        self,
        index: int = 0,
        *,
        runtime: Any = torch.cuda,
        library: Amdsmi | None = None,
        driver: HipDriver | None = None,
        root: Path = Path("/"),
        zeros: Zeros = torch_zeros,
    ) -> None:
        super().__init__(index, runtime, root, zeros)
        self._driver = driver
        self._arch = str(getattr(self._properties, "gcnArchName", "")).partition(":")[0]
        flag = getattr(self._properties, "is_integrated", None)
        self._is_integrated = bool(flag) or self._arch.startswith(_APUS)
        self._library = library if library and library.is_of(int(self._properties.total_memory)) else None
        self._disagreement = ""
        share = ProcessShare(
            os.getpid(),
            _ListOfProcesses(self._library, self._least_known) if self._library else None,
            self._create_context,
            self._reserved_bytes,
            context_exists=self._reserved_bytes() > 0,
            steady_free=not self._is_integrated,
        )
        self._start(share)

    def _least_known(self) -> int:
        return self._reserved_bytes() + self._arena_beside_bytes()

    def _create_context(self) -> tuple[int, int]:
        self._runtime.set_device(self._index)
        memory = self._device_memory()
        return memory.free_bytes, memory.total_bytes

    def _find_capabilities(self) -> Capabilities:
        why_not = self._why_no_virtual_memory()
        if why_not:
            self.reasons["reserve_commit"] = why_not
        virtual = not why_not and self._driver is not None
        native_bfloat16 = self._arch.startswith(_NATIVE_BFLOAT16)
        return Capabilities(
            host_memory=False,
            reserve_commit=virtual,
            arena_backend="virtual" if virtual else "static",
            granularity_bytes=self._driver.granularity_bytes() if virtual and self._driver else 2 * MIB,
            graphs=True,
            graph_modes=ALL_MODES,
            trusted_readings=not self._is_wsl,
            resettable_peak=True,
            cap_enforced=hasattr(self._runtime, "set_per_process_memory_fraction"),
            over_allocation_kills=self._is_wsl or self._is_integrated,
            async_tokens=True,
            dtypes=("bfloat16", "float16", "float32") if native_bfloat16 else ("float16", "float32"),
        )

    def _why_no_virtual_memory(self) -> str:
        if self._driver is None:
            return "The HIP runtime that torch uses was not found in this process."
        if self._is_wsl or os.name != "posix":
            return "Virtual memory calls work on Linux itself only."
        return self._driver.why_no_virtual_memory()

    def _device_memory(self) -> DeviceMemory:
        whole_bytes = int(self._properties.total_memory)
        free_bytes, total_bytes = (int(value) for value in self._runtime.mem_get_info(self._index))
        complaints = [_SPILLS] if self._is_wsl else []
        source = "device"
        if total_bytes <= 0:
            complaints.append(f"HIP names a total of {total_bytes} bytes")
            total_bytes = whole_bytes
        driver_bytes = None if self._is_integrated or self._library is None else self._library.free_bytes()
        is_absurd = not 0 <= free_bytes <= total_bytes
        if driver_bytes is not None:
            driver_bytes = min(driver_bytes, total_bytes)
            if not self._disagreement and (is_absurd or abs(driver_bytes - free_bytes) * _DISAGREEMENT > total_bytes):
                self._disagreement = f"HIP says {format_bytes(free_bytes)} are free, the driver {format_bytes(driver_bytes)}"
            if self._disagreement:  # once is enough: a figure that stands still meets the true one sooner or later
                complaints.append(self._disagreement)
                free_bytes, source = driver_bytes, "the driver's account"
        elif is_absurd:
            complaints.append(f"HIP says {free_bytes} bytes are free of {total_bytes}")
            free_bytes, source = max(0, total_bytes - self._least_known()), "what we do not hold ourselves"
        return DeviceMemory(free_bytes, total_bytes, source, "; ".join(complaints))

    def _is_lost(self, first_line: str) -> bool:
        return first_line.startswith(("HIP error", "CUDA error", "Triton Error [HIP]")) or "HSA_STATUS_ERROR" in first_line

    def virtual_memory(self) -> HipDriver:
        """The runtime's virtual memory calls."""
        assert self._driver is not None, "only where reserve_commit"
        return self._driver

    def describe(self) -> dict[str, object]:
        """Name, versions, which kind of device it is, where our share is read and what is not used, with the reason."""
        now = self.reading()
        return {
            "platform": self.name,
            "device": self._properties.name,
            "architecture": self._arch or "unknown",
            "multiprocessors": self._properties.multi_processor_count,
            "driver": (self._library.driver_version() if self._library else None) or "unknown",
            "hip": torch.version.hip,
            "torch": version("torch"),
            **self._describe_share(now),
        }


class _ListOfProcesses:
    """The management library, whose list is not believed where it shows less of us than we know that we hold."""

    def __init__(self, library: Amdsmi, least_bytes: Callable[[], int]) -> None:
        self._library = library
        self._least_bytes = least_bytes
        self.free_bytes = library.free_bytes
        self.is_of = library.is_of

    def process_bytes(self) -> dict[int, int] | None:
        """As listed; without our own process where its figure is too small."""
        listed = self._library.process_bytes()
        if listed is not None and listed.get(os.getpid(), 0) < self._least_bytes():
            listed.pop(os.getpid(), None)
        return listed


def open_rocm() -> RocmPlatform:
    """The first visible ROCm device. Raises DeviceError where torch has none."""
    if torch.version.hip is None or not torch.cuda.is_available():
        raise DeviceError("No ROCm device: torch was built without HIP, or the driver shows no device.")
    runtime = loaded_runtime()
    driver = None if runtime is None else HipDriver(0, runtime)
    library = None
    try:  # optional part; it loads the driver's library when it is imported, and raises what that raises
        import amdsmi

        library = Amdsmi(_bus_id(driver), amdsmi)
    except Exception:
        library = None
    return RocmPlatform(0, library=library if library and library.works else None, driver=driver)


def _bus_id(driver: HipDriver | None) -> str:
    try:
        return "" if driver is None else driver.bus_id()
    except DeviceError:
        return ""
