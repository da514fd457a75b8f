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

_TOTAL_TOLERANCE = 20  # one part in: an H100 is 81,559 MiB here and 81,079 MiB to CUDA; a slice is at most about half


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

    def name(self) -> str | None:
        """The product's name."""
        name = self._try(lambda: self._library.nvmlDeviceGetName(self._handle)) if self.works else None
        return name.decode() if isinstance(name, bytes) else name

    def total_bytes(self) -> int | None:
        """The card's memory, also where the device is a slice of it."""
        info = self._memory()
        return None if info is None else int(info.total)

    def free_bytes(self) -> int | None:
        """Free memory of the device; needs no context of our own."""
        info = self._memory()
        return None if info is None else int(info.free)

    def is_of(self, total_bytes: int) -> bool:
        """Whether the library's total is that of CUDA's device of total_bytes, and not of the card it is a slice of."""
        info = self._memory()
        return info is not None and abs(int(info.total) - total_bytes) * _TOTAL_TOLERANCE <= total_bytes

    def process_bytes(self) -> dict[int, int] | None:
        """Bytes by process id, of those whose bytes are known; None where the library lists no processes.

        A process that is listed more than once (a context each, or a slice each) holds the sum.
        """
        if not self.works:
            return None
        listed = self._try(lambda: self._library.nvmlDeviceGetComputeRunningProcesses(self._handle))
        if listed is None:
            return None
        held: dict[int, int] = {}
        for process in listed:
            if process.usedGpuMemory is not None:
                held[int(process.pid)] = held.get(int(process.pid), 0) + int(process.usedGpuMemory)
        return held

    def driver_version(self) -> str | None:
        """As the library writes it."""
        version = self._try(self._library.nvmlSystemGetDriverVersion)
        return version.decode() if isinstance(version, bytes) else version

    def cuda_version(self) -> str | None:
        """The newest CUDA that the driver speaks, "13.0"; None where it does not say."""
        number = self._try(self._library.nvmlSystemGetCudaDriverVersion)
        return None if number is None else f"{number // 1000}.{number % 1000 // 10}"

    def error_correction(self) -> bool | None:
        """Whether memory is error-corrected (ECC), which takes a part of it on some cards; None where that is not known."""
        if not self.works:
            return None
        modes = self._try(lambda: self._library.nvmlDeviceGetEccMode(self._handle))
        return None if modes is None else bool(modes[0])

    def _memory(self) -> Any:
        if not self.works:
            return None
        return self._try(lambda: self._library.nvmlDeviceGetMemoryInfo(self._handle))


def list_cards(library: Any) -> list[Nvml]:
    """Every card of this machine, in the library's order; none where it does not answer."""
    try:
        library.nvmlInit()
        handles = [library.nvmlDeviceGetHandleByIndex(index) for index in range(library.nvmlDeviceGetCount())]
        uuids = [library.nvmlDeviceGetUUID(handle) for handle in handles]
    except library.NVMLError:
        return []
    texts = [uuid.decode() if isinstance(uuid, bytes) else uuid for uuid in uuids]
    return [Nvml(uuid.removeprefix("GPU-"), library) for uuid in texts]
