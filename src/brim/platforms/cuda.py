"""The CUDA platform: one NVIDIA device as this process sees it. Owns which reading is right for the kind of device it is.

    plain GPU     total and free from the runtime; ours from the management library's list of processes
    MIG slice     the same, of the slice; the management library's own total is the whole card's and is not used
    container     nothing special but for the list, which may not know our process id: see process_share
    WSL           no list and no virtual memory calls; over-allocation spills to the host instead of failing: untrusted
    integrated    memory is the host's: free is the least of MemAvailable and what control groups leave; CUDA's own figure counts
                  page cache as used there (vllm #48140), though the kernel gives that back to whoever allocates

Source: CUDA runtime API cudaMemGetInfo; torch.cuda memory management and CUDAGraph; NVML reference.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from brim.errors import BrimError, DeviceError, first_line
from brim.platforms.base import Capabilities
from brim.platforms.cuda_driver import CudaDriver
from brim.platforms.nvml import Nvml
from brim.platforms.process_share import ProcessShare
from brim.platforms.torch_platform import ALL_MODES, DeviceMemory, TorchPlatform
from brim.units import MIB

_SPILLS = "under WSL taking too much spills to the host's memory instead of failing, and free is a budget that moves"
# Only errors that the runtime's reference calls a process's end lose the device. These are the launches that never began:
_REFUSED_LAUNCHES = (
    "no kernel image is available",
    "invalid device function",
    "invalid configuration argument",
    "too many resources requested for launch",
)
_LOST_PREFIXES = ("CUDA error", "Triton Error [CUDA]")


class CudaPlatform(TorchPlatform):
    """`runtime` is torch.cuda, `nvml` and `driver` the parts torch lacks (None: not installed); all may be scripted.

    root is where /proc and /sys are looked for. Construction creates the context and measures it. Raises DeviceError where
    there is no such device.
    """

    name = "cuda"
    counts_page_cache = True

    def __init__(
        self,
        index: int = 0,
        *,
        runtime: Any = torch.cuda,
        nvml: Nvml | None = None,
        driver: CudaDriver | None = None,
        root: Path = Path("/"),
    ) -> None:
        super().__init__(index, runtime, root)
        self._nvml = nvml
        self._driver = driver
        self._is_integrated = bool(getattr(self._properties, "is_integrated", False))
        share = ProcessShare(
            os.getpid(),
            nvml,
            self._create_context,
            self._reserved_bytes,
            context_exists=bool(driver and driver.has_context()),
            steady_free=not self._is_integrated,
        )
        self._start(share)

    def _create_context(self) -> tuple[int, int]:
        self._runtime.set_device(self._index)
        free_bytes, total_bytes = self._runtime.mem_get_info(self._index)
        return int(free_bytes), int(total_bytes)

    def _find_capabilities(self) -> Capabilities:
        why_not = self._why_no_virtual_memory()
        if why_not:
            self.reasons["reserve_commit"] = why_not
        virtual = not why_not
        native_bf16 = self._properties.major >= 8
        return Capabilities(
            host_memory=False,
            reserve_commit=virtual,
            arena_backend="virtual" if virtual else "static",
            granularity_bytes=self._driver.granularity_bytes() if virtual and self._driver else 2 * MIB,
            graphs=True,
            graph_modes=ALL_MODES,
            trusted_readings=not self._is_wsl,
            resettable_peak=True,
            cap_enforced=True,
            over_allocation_kills=self._is_wsl or self._is_integrated,
            async_tokens=True,
            mapped_host=True,
            dtypes=("bfloat16", "float16", "float32") if native_bf16 else ("float16", "float32"),
        )

    def _why_no_virtual_memory(self) -> str:
        if self._driver is None:
            return "The driver's bindings are not installed (cuda-bindings)."
        if self._is_wsl:
            return "There are no virtual memory calls under WSL."
        return self._driver.why_no_virtual_memory()

    def _device_memory(self) -> DeviceMemory:
        free_bytes, total_bytes = self._runtime.mem_get_info(self._index)
        return DeviceMemory(free_bytes, total_bytes, complaint=_SPILLS if self._is_wsl else "")

    def _is_lost(self, first_line: str) -> bool:
        return first_line.startswith(_LOST_PREFIXES) or "CUDA driver error" in first_line

    def as_brim_error(self, error: BaseException) -> BrimError | None:
        """Also launches that the device refuses and survives: nothing ran, and this process can go on."""
        if isinstance(error, RuntimeError) and any(words in first_line(error) for words in _REFUSED_LAUNCHES):
            return DeviceError(f"The device refuses the work: {first_line(error)}")
        return super().as_brim_error(error)

    def virtual_memory(self) -> CudaDriver:
        """The driver's virtual memory calls."""
        assert self._driver is not None, "only where reserve_commit"
        return self._driver

    def describe(self) -> dict[str, object]:
        """Name, versions, which kind of device it is and where our share is read."""
        now = self.reading()
        return {
            "platform": self.name,
            "device": self._properties.name,
            "compute_capability": f"{self._properties.major}.{self._properties.minor}",
            "multiprocessors": self._properties.multi_processor_count,
            "uuid": str(getattr(self._properties, "uuid", "unknown")),
            "driver": (self._nvml.driver_version() if self._nvml else None) or "unknown",
            "driver_cuda": (self._nvml.cuda_version() if self._nvml else None) or "unknown",
            "cuda": torch.version.cuda,
            "torch": version("torch"),
            **self._describe_share(now),
            "ours_bytes": now.ours_bytes,
            "own_account_bytes": self._share.own_account(self._runtime.mem_get_info(self._index)[0], self._arena_beside_bytes()),
            "free_before_context_bytes": self._share.free_before_bytes,
            "free_after_context_bytes": self._share.free_after_bytes,
            "error_correction": self._nvml.error_correction() if self._nvml else None,
            "is_slice": bool(self._nvml and self._nvml.is_slice),
        }


def open_cuda() -> CudaPlatform:
    """The first visible CUDA device. Raises DeviceError where torch has none."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        raise DeviceError("No CUDA device: torch was built without CUDA, or the driver shows no device.")
    nvml = driver = None
    try:  # optional parts
        import pynvml

        nvml = Nvml(str(torch.cuda.get_device_properties(0).uuid), pynvml)
    except ImportError:
        pass
    try:
        from cuda.bindings import driver as bindings

        driver = CudaDriver(0, bindings)
    except ImportError:
        pass
    return CudaPlatform(0, nvml=nvml, driver=driver)
