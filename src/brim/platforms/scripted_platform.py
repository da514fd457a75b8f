"""The real platforms over scripted devices. Owns which one reads a script, and tensors that hold nothing: the code that judges
readings, keeps the cap and captures graphs is the one that runs on hardware.

Tensors live on torch's meta device: shapes without arithmetic. While a worker's work is entered, what torch would allocate there
is taken from the script's allocator, and copies back to the host bring nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from brim.errors import OutOfDeviceMemory
from brim.platforms.base import Capabilities, MemoryReading, Platform
from brim.platforms.cpu import CpuPlatform
from brim.platforms.cuda import CudaPlatform
from brim.platforms.rocm import RocmPlatform
from brim.platforms.scenario import Work
from brim.platforms.scripted_allocator import Block
from brim.platforms.scripted_device import ScriptedDevice
from brim.platforms.scripted_host import ScriptedHost
from brim.platforms.scripted_memory import ScriptedMemory
from brim.platforms.scripted_runtime import ScriptedClients, ScriptedLibrary, ScriptedRuntime
from brim.platforms.torch_platform import ALL_MODES, NO_MODES, DeviceMemory, TorchPlatform
from brim.platforms.xpu import XpuPlatform

_META = torch.device("meta")
_FACTORIES = (torch.zeros, torch.empty, torch.full, torch.ones)
_PLAIN_ADDRESS = 1 << 40


class ScriptedTensors(TorchFunctionMode):
    """What torch allocates on the meta device is taken from the script; nothing is page-locked, nothing comes back."""

    def __init__(self, runtime: ScriptedRuntime) -> None:
        super().__init__()
        self._runtime = runtime
        self._blocks: list[Block] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See TorchFunctionMode."""
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.copy_ and args[1].is_meta and not args[0].is_meta:
            return args[0]
        if func is torch.Tensor.tolist and args[0].is_meta:
            return torch.zeros(args[0].shape, dtype=args[0].dtype).tolist()
        made = func(*args, **kwargs)
        if func in _FACTORIES and made.is_meta:
            self._blocks.append(self._runtime.allocator.allocate(made.nbytes))
        return made


class ScriptedTorch(TorchPlatform):
    """Mixed into a platform of a framework's device: it reads `device` and computes nothing."""

    device: ScriptedDevice
    runtime: ScriptedRuntime
    host: ScriptedHost

    def _play(self, device: ScriptedDevice) -> None:
        """Before the platform is constructed."""
        self.device, self.runtime, self.host = device, ScriptedRuntime(device), ScriptedHost(device)
        self._memory_calls = ScriptedMemory(device)
        self._tensors = ScriptedTensors(self.runtime)
        self._library_of_driver = None if device.script.is_wsl or device.script.like == "xpu" else ScriptedLibrary(device)

    def work(self, kind: Work, rows: int = 1) -> None:
        """A kernel of this kind ran."""
        self.runtime.work(kind, rows)

    def _device_memory(self) -> DeviceMemory:
        self.host.tell()
        return super()._device_memory()  # type: ignore[safe-super]  # the real platform's, which comes next

    def _find_capabilities(self) -> Capabilities:
        script = self.device.script
        virtual = script.virtual_memory and not script.is_wsl
        if not virtual:
            self.reasons["reserve_commit"] = "The scripted driver has no virtual memory calls."
        else:
            self.reasons.pop("reserve_commit", None)
        if not script.graphs:
            self.reasons["graphs"] = "The scripted runtime captures no graphs."
        return replace(
            super()._find_capabilities(),  # type: ignore[safe-super]
            reserve_commit=virtual,
            arena_backend="virtual" if virtual else "static",
            granularity_bytes=script.granularity_bytes,
            graphs=script.graphs,
            graph_modes=ALL_MODES if script.graphs else NO_MODES,
        )

    def torch_device(self) -> torch.device:
        """Where nothing is held."""
        return _META

    @contextmanager
    def stream(self) -> Iterator[Any]:
        """Everything inside allocates from the script."""
        with self._tensors:
            yield None

    def set_cap(self, cap_bytes: int) -> None:
        """Also told to the script, which watches it."""
        self.device.cap_bytes = cap_bytes
        super().set_cap(cap_bytes)

    def memory_view(self, address: int, num_bytes: int) -> torch.Tensor:
        """A shape of so many bytes."""
        return torch.empty_strided((num_bytes,), (1,), dtype=torch.uint8, device=_META)

    def virtual_memory(self) -> Any:
        """The script's calls."""
        return self._memory_calls

    def plain_memory(self, num_bytes: int) -> tuple[int, Any] | None:
        """From the script's allocator; KV, not what is needed beside it."""
        return _PLAIN_ADDRESS, self.runtime.allocator.allocate(num_bytes, is_kv=True)

    def release_unused(self) -> int:
        """The real one without a look through the interpreter's whole heap."""
        before_bytes = self.reading().ours_bytes
        self.runtime.empty_cache()
        return max(0, before_bytes - self.reading().ours_bytes)


class ScriptedCuda(ScriptedTorch, CudaPlatform):
    """CudaPlatform over a script."""

    def __init__(self, device: ScriptedDevice) -> None:
        self._play(device)
        CudaPlatform.__init__(self, runtime=self.runtime, nvml=self._library_of_driver, root=self.host.root)  # type: ignore[arg-type]


class ScriptedRocm(ScriptedTorch, RocmPlatform):
    """RocmPlatform over a script."""

    def __init__(self, device: ScriptedDevice) -> None:
        self._play(device)
        library: Any = self._library_of_driver
        RocmPlatform.__init__(self, runtime=self.runtime, library=library, root=self.host.root, zeros=self.runtime.zeros)  # type: ignore[arg-type]


class ScriptedXpu(ScriptedTorch, XpuPlatform):
    """XpuPlatform over a script."""

    def __init__(self, device: ScriptedDevice) -> None:
        self._play(device)
        zeros: Any = self.runtime.zeros
        clients = ScriptedClients(device)
        XpuPlatform.__init__(self, runtime=self.runtime, clients=clients, root=self.host.root, zeros=zeros)


class ScriptedCpu(CpuPlatform):
    """CpuPlatform over a scripted host; tensors hold nothing, and the arena's memory is the script's."""

    def __init__(self, device: ScriptedDevice) -> None:
        self.device, self.runtime = device, ScriptedRuntime(device)
        self.runtime.set_device(0)
        self.host = ScriptedHost(device)
        self._tensors, self._memory_calls = ScriptedTensors(self.runtime), ScriptedMemory(device)
        super().__init__(self.host.root, lambda name: None)
        script = device.script
        self.restrict(
            reserve_commit=script.virtual_memory,
            arena_backend="virtual" if script.virtual_memory else "static",
            granularity_bytes=script.granularity_bytes,
        )

    def work(self, kind: Work, rows: int = 1) -> None:
        """A kernel of this kind ran."""
        self.runtime.work(kind, rows)

    def reading(self) -> MemoryReading:
        """From the files, as they are now."""
        self.host.tell()
        return super().reading()

    def reset_peak(self) -> None:
        """The kernel's mark starts anew."""
        self.host.reset_peak()
        super().reset_peak()

    def set_cap(self, cap_bytes: int) -> None:
        """Also told to the script, which watches it."""
        self.device.cap_bytes = cap_bytes
        super().set_cap(cap_bytes)

    def torch_device(self) -> torch.device:
        """Where nothing is held."""
        return _META

    @contextmanager
    def stream(self) -> Iterator[Any]:
        """Everything inside allocates from the script."""
        with self._tensors:
            yield None

    def memory_view(self, address: int, num_bytes: int) -> torch.Tensor:
        """A shape of so many bytes."""
        return torch.empty_strided((num_bytes,), (1,), dtype=torch.uint8, device=_META)

    def virtual_memory(self) -> Any:
        """The script's calls."""
        return self._memory_calls

    def plain_memory(self, num_bytes: int) -> tuple[int, Any] | None:
        """From the script's allocator; KV, not what is needed beside it."""
        return _PLAIN_ADDRESS, self.runtime.allocator.allocate(num_bytes, is_kv=True)

    def release_unused(self) -> int:
        """The script's allocator gives back what it only keeps."""
        before_bytes = self.device.ours_bytes
        self.runtime.empty_cache()
        return before_bytes - self.device.ours_bytes


ScriptedPlatform = ScriptedCuda | ScriptedRocm | ScriptedXpu | ScriptedCpu
_KINDS: dict[str, type[Platform]] = {"cuda": ScriptedCuda, "rocm": ScriptedRocm, "xpu": ScriptedXpu, "cpu": ScriptedCpu}


def scripted_platform(device: ScriptedDevice) -> ScriptedPlatform:
    """The platform that the script asks for. Raises OutOfDeviceMemory where not even a context fits, DeviceError, DeviceLost."""
    made: Any = _KINDS[device.script.like]
    platform: ScriptedPlatform = made(device)
    if not isinstance(platform, Platform):
        raise OutOfDeviceMemory("unreachable")
    return platform
