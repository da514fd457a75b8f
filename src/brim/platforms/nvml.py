"""What the driver's management library says of one device: memory without a context, and each process's share. Owns its errors.

Every figure is optional: the library may be missing, may not list processes of another PID namespace (containers), and answers
"not supported" on WSL, on some slices (MIG) and on virtual GPUs. A figure that cannot be had is None, never a guess.
Source: NVIDIA Management Library reference, nvmlDeviceGetMemoryInfo and nvmlDeviceGetComputeRunningProcesses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class Nvml:
    """One device, by its UUID as CUDA names it. `library` is pynvml, or a scripted stand-in."""

    def __init__(self, uuid: str, library: Any) -> None:
        self._library = library
        self._failed = False
        self._handle: Any = None
        self.is_slice = False
        if self._try(library.nvmlInit) is None and self._failed:
            return
        for prefix in ("GPU-", "MIG-"):
            handle = self._try(partial(library.nvmlDeviceGetHandleByUUID, prefix + uuid))
            if handle is not None:
                self._handle, self.is_slice = handle, prefix == "MIG-"
                return

    def _try(self, call: Callable[[], T]) -> T | None:
        """The call's result; None, and `_failed`, where the library refuses."""
        self._failed = False
        try:
            return call()
        except self._library.NVMLError:
            self._failed = True
            return None

    @property
    def works(self) -> bool:
        """The device was found."""
        return self._handle is not None

    def free_bytes(self) -> int | None:
        """Free memory of the device; needs no context of our own."""
        if not self.works:
            return None
        info = self._try(lambda: self._library.nvmlDeviceGetMemoryInfo(self._handle))
        return None if info is None else int(info.free)

    def process_bytes(self) -> dict[int, int] | None:
        """Bytes by process id; None where the library lists no processes or does not know what one of them holds."""
        if not self.works:
            return None
        listed = self._try(lambda: self._library.nvmlDeviceGetComputeRunningProcesses(self._handle))
        if listed is None or any(process.usedGpuMemory is None for process in listed):
            return None
        return {int(process.pid): int(process.usedGpuMemory) for process in listed}

    def driver_version(self) -> str | None:
        """As the library writes it."""
        version = self._try(self._library.nvmlSystemGetDriverVersion)
        return version.decode() if isinstance(version, bytes) else version
