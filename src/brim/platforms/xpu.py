"""The XPU platform: one Intel device as this process sees it. Owns which reading is right for the kind of device it is.

    graphics card  total from its properties; free from the SYCL runtime where that is supported and moves
    integrated     memory is the host's: total and free are bounded by the host's and by control groups; nothing else is read

Free memory has not moved by what was allocated, or cannot be asked for (pytorch #161381, #164429), and taking too much loses
the device instead of failing. So what is free is tried once at open, with 64 MiB and only where far more is free; then Level
Zero's usable memory, likewise; and where neither moves, what we took since decides, and the reading says so. What is ours
comes from the kernel's account of this process where the driver keeps one (see drm_clients); the same trial finds out which
device's it is. Elsewhere it is our own account.
Graphs follow torch.xpu.XPUGraph (torch 2.11); none is captured here to find out, because that can lose the device: `brim
doctor` tries it in a process of its own. Written against the documentation; never run on the hardware.
Source: torch.xpu; Level Zero specification; SYCL extension sycl_ext_intel_device_info (free memory).
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from brim.errors import DeviceError, DeviceLost, first_line
from brim.platforms.base import Capabilities
from brim.platforms.device_view import ONE_API, view_at
from brim.platforms.drm_clients import DrmClients
from brim.platforms.level_zero import LevelZero, loaded_loader
from brim.platforms.process_share import CONTEXT_BYTES, ProcessShare
from brim.platforms.sycl_context import NoContext, native_context
from brim.platforms.torch_platform import ALL_MODES, NO_MODES, DeviceMemory, TorchPlatform, Zeros, torch_zeros
from brim.units import GIB, MIB, format_bytes

TRIAL_BYTES = 64 * MIB
_CLEARLY_FREE_BYTES = 2 * GIB
Ask = Callable[[], int | None]
_LOST_WORDS = ("DEVICE_LOST", "UR_RESULT_ERROR_OUT_OF_RESOURCES", "UR_RESULT_ERROR_UNKNOWN", "PI_ERROR_DEVICE_LOST")


class XpuPlatform(TorchPlatform):
    """`runtime` is torch.xpu, `level_zero` what torch lacks (None: not there); all may be scripted. view_of: see device_view.

    Construction creates the context and tries the readings. Raises DeviceError where there is no such device.
    """

    name = "xpu"
    device_type = "xpu"
    pool_calls = ("_xpu_endAllocateToPool", "_xpu_releasePool")

    def __init__(
        self,
        index: int = 0,
        *,
        runtime: Any = torch.xpu,
        level_zero: LevelZero | None = None,
        clients: DrmClients | None = None,
        root: Path = Path("/"),
        zeros: Zeros = torch_zeros,
        view_of: Callable[[int, int, int, int], torch.Tensor] = view_at,
    ) -> None:
        super().__init__(index, runtime, root, zeros)
        self._level_zero = level_zero
        self._view_of = view_of
        self._plain: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
        self._is_integrated = bool(getattr(self._properties, "is_integrated_gpu", False))
        self._whole_bytes = int(self._properties.total_memory)
        runtime.set_device(index)
        self._asks: tuple[str, Ask] | None = None  # what reports free memory, and how it is asked
        self._stale: list[Ask] = []  # sources that answer, but do not move by what we take
        self._complaint = ""
        self._reserved_at_open_bytes = self._reserved_bytes()
        self._clients = clients or DrmClients(root)
        self._address = _only(self._clients.held_bytes())
        said_bytes = self._find_reading()
        self._held_at_open_bytes = self._held_by_kernel()
        self._free_at_open_bytes = max(0, min([self._whole_bytes - (self._held_at_open_bytes or CONTEXT_BYTES), *said_bytes]))
        share = ProcessShare(
            os.getpid(),
            _KernelsList(self._held_by_kernel) if self._held_at_open_bytes else None,
            self._free_and_total,
            self._reserved_bytes,
            context_exists=True,
            steady_free=self._asks is not None and not self._is_integrated,
        )
        self._start(share)

    # -- readings

    def _find_reading(self) -> list[int]:
        """The first source of free memory that moves when memory is taken is used, none where none does; what the others said."""
        why_not: list[str] = []
        said_bytes: list[int] = []
        sources: list[tuple[str, Ask]] = [("device", self._sycl_free)]
        if self._level_zero is not None:
            sources.append(("usable memory by Level Zero", self._level_zero.usable_bytes))
        for source, ask in sources:
            free_bytes = ask()
            if free_bytes is None:
                why_not.append(f"{source}: free memory cannot be asked for")
            elif not 0 <= free_bytes <= self._whole_bytes:
                why_not.append(f"{source}: {free_bytes} bytes free of {self._whole_bytes}")
            else:
                why = self._why_it_does_not_move(ask, free_bytes)
                if not why:
                    self._asks = (source, ask)
                    return said_bytes
                why_not.append(f"{source}: {why}")
                self._stale.append(ask)
                said_bytes.append(free_bytes)
        self._complaint = "; ".join(why_not)
        return said_bytes

    def _free_and_total(self) -> tuple[int, int]:
        memory = self._device_memory()
        return memory.free_bytes, memory.total_bytes

    def _why_it_does_not_move(self, ask: Ask, before_bytes: int) -> str:
        """ "" where free falls by half of what is taken, or more. Nothing is taken where little is free."""
        held = self._clients.held_bytes()
        clearly_free_bytes = min(before_bytes, self._host_available()) if self._is_integrated else before_bytes
        if clearly_free_bytes < _CLEARLY_FREE_BYTES:
            return f"{format_bytes(clearly_free_bytes)} free are too little to try whether the figure moves"
        try:
            taken = self._zeros(TRIAL_BYTES, self.torch_device())
            self._runtime.synchronize(self._index)
        except RuntimeError as error:
            known = self.as_brim_error(error)
            if isinstance(known, DeviceLost):
                raise known from error
            return f"{format_bytes(TRIAL_BYTES)} could not be taken: {first_line(error)}"
        during_bytes = ask()
        grown = [name for name, now in self._clients.held_bytes().items() if now - held.get(name, 0) >= TRIAL_BYTES // 2]
        self._address = _only(grown) or self._address
        del taken
        self._runtime.empty_cache()
        if during_bytes is None or before_bytes - during_bytes < TRIAL_BYTES // 2:
            return f"free memory did not move when {format_bytes(TRIAL_BYTES)} were taken"
        return ""

    def _sycl_free(self) -> int | None:
        """What the SYCL runtime reports; None where this device, driver or torch has no such figure."""
        try:
            free_bytes, _ = self._runtime.mem_get_info(self._index)
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            known = self.as_brim_error(error)
            if isinstance(known, DeviceLost):
                raise known from error
            return None
        return int(free_bytes)

    def _device_memory(self) -> DeviceMemory:
        total_bytes = min(self._whole_bytes, self._host_total()) if self._is_integrated else self._whole_bytes
        source, complaint = "device", self._complaint
        free_bytes = None
        if self._asks is not None:
            source, ask = self._asks
            free_bytes = ask()
            if free_bytes is None or not 0 <= free_bytes <= self._whole_bytes:
                complaint = f"{source}: {free_bytes} bytes free of {self._whole_bytes}"
                free_bytes = None
        if free_bytes is None:
            source = "our own account"
            taken_bytes = self._reserved_bytes() - self._reserved_at_open_bytes + self._arena_beside_bytes()
            held_bytes = self._held_by_kernel()
            if held_bytes and self._held_at_open_bytes:
                taken_bytes = held_bytes - self._held_at_open_bytes
            said = [said_bytes for ask in self._stale if (said_bytes := ask()) is not None and said_bytes >= 0]
            free_bytes = min([self._free_at_open_bytes - taken_bytes, *said])
        return DeviceMemory(max(0, min(free_bytes, total_bytes)), total_bytes, source, complaint)

    def _held_by_kernel(self) -> int:
        """0 where the kernel has no account, or memory is the host's."""
        return 0 if self._is_integrated or not self._address else self._clients.held_bytes().get(self._address, 0)

    # -- what it can do

    def _find_capabilities(self) -> Capabilities:
        for name, why_not in (("reserve_commit", self._why_no_virtual_memory()), ("graphs", self._why_no_graphs())):
            if why_not:
                self.reasons[name] = why_not
        virtual, graphs = "reserve_commit" not in self.reasons, "graphs" not in self.reasons
        native_bfloat16 = bool(getattr(self._properties, "has_bfloat16_conversions", False))
        native_float16 = bool(getattr(self._properties, "has_fp16", True))
        dtypes = [("bfloat16", native_bfloat16), ("float16", native_float16), ("float32", True)]
        return Capabilities(
            host_memory=False,
            reserve_commit=virtual,
            arena_backend="virtual" if virtual else "static",
            granularity_bytes=self._level_zero.granularity_bytes() if virtual and self._level_zero else 2 * MIB,
            graphs=graphs,
            graph_modes=ALL_MODES if graphs else NO_MODES,
            trusted_readings=self._asks is not None,
            resettable_peak=True,
            cap_enforced=hasattr(self._runtime, "set_per_process_memory_fraction"),
            over_allocation_kills=True,
            async_tokens=True,
            dtypes=tuple(name for name, is_native in dtypes if is_native),
        )

    def _why_no_virtual_memory(self) -> str:
        if self._level_zero is None:
            return "The Level Zero loader that torch uses was not found in this process."
        if self._is_wsl or os.name != "posix":
            return "Virtual memory calls work on Linux itself only."
        return self._level_zero.why_no_virtual_memory()

    def _why_no_graphs(self) -> str:
        """By what torch offers, never by trying: a capture that fails can lose the device."""
        missing = [name for name in ("XPUGraph", "graph_pool_handle") if not hasattr(self._runtime, name)]
        if missing:
            return f"This torch has no torch.xpu.{missing[0]}; 2.11 and newer have it."
        if self._new_pool() is None:
            return "This torch was built without graphs for the device."
        if self._is_wsl:
            return "Graphs are not known to work under WSL."
        return ""

    def _new_pool(self) -> Any:
        try:
            return self._runtime.graph_pool_handle()
        except (AttributeError, RuntimeError):  # torch before 2.11, or a build without the device
            return None

    def _new_graph(self) -> Any:
        return self._runtime.XPUGraph()

    def _begin(self, graph: Any) -> None:
        graph.capture_begin(pool=self._pool)  # it takes no error mode

    def _allocator_total_bytes(self) -> int:
        return self._whole_bytes

    def _is_lost(self, first_line: str) -> bool:
        return any(word in first_line for word in _LOST_WORDS)

    def plain_memory(self, num_bytes: int) -> tuple[int, Any] | None:
        """From torch's allocator, zeroed, and remembered: a view of it needs no exchange."""
        found = super().plain_memory(num_bytes)
        assert found is not None, "torch allocates"
        self._plain[found[0]] = found[1]
        return found

    def memory_view(self, address: int, num_bytes: int) -> torch.Tensor:
        """Through DLPack where the memory is the driver's: the first page must be backed, the others may be later."""
        plain = self._plain.get(address)
        if plain is not None and plain.numel() >= num_bytes:
            return plain[:num_bytes]
        return self._view_of(address, num_bytes, ONE_API, self._index)

    def virtual_memory(self) -> LevelZero:
        """The driver's virtual memory calls."""
        assert self._level_zero is not None, "only where reserve_commit"
        return self._level_zero

    def describe(self) -> dict[str, object]:
        """Name, versions, which kind of device it is, where figures come from and what is not used, with the reason."""
        now = self.reading()
        return {
            "platform": self.name,
            "device": self._properties.name,
            "driver": str(getattr(self._properties, "driver_version", "unknown")),
            "subslices": getattr(self._properties, "gpu_subslice_count", "unknown"),
            "torch": version("torch"),
            **self._describe_share(now),
        }


class _KernelsList:
    """The kernel's account as a list of processes that shows this one alone."""

    def __init__(self, held_bytes: Callable[[], int]) -> None:
        self._held_bytes = held_bytes

    def free_bytes(self) -> None:
        """Not in the account."""

    def is_of(self, total_bytes: int) -> bool:
        """The device was found by what moved on it."""
        return True

    def process_bytes(self) -> dict[int, int] | None:
        """This process; None where the account is gone."""
        held_bytes = self._held_bytes()
        return {os.getpid(): held_bytes} if held_bytes else None


def _only(names: Iterable[str]) -> str:
    """The one there is; "" where there is none, or more than one."""
    found = list(names)
    return found[0] if len(found) == 1 else ""


def open_xpu() -> XpuPlatform:
    """The first visible XPU device. Raises DeviceError where torch has none."""
    if not hasattr(torch, "xpu") or not torch.xpu.is_available():
        raise DeviceError("No XPU device: torch was built without XPU, or the driver shows no device.")
    torch.xpu.set_device(0)
    torch.xpu.synchronize(0)  # the runtime has loaded what it loads
    return XpuPlatform(0, level_zero=_level_zero())


def _level_zero() -> LevelZero | None:
    loader = loaded_loader()
    uuid = str(getattr(torch.xpu.get_device_properties(0), "uuid", ""))
    if loader is None or not uuid:
        return None
    context, why_not = None, ""
    try:
        context = native_context(int(torch.xpu.current_stream(0).sycl_queue))
    except NoContext as error:
        why_not = str(error)
    try:
        return LevelZero(uuid, loader, context=context, why_no_context=why_not, wait=torch.xpu.synchronize)
    except DeviceError:
        return None
