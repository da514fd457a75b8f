"""Scripted stand-ins for torch.xpu and for Level Zero's C functions, over one truth."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from brim.platforms.drm_clients import DrmClients
from brim.platforms.level_zero import LevelZero
from brim.platforms.xpu import XpuPlatform
from brim.units import GIB, KIB, MIB

UUID = "868080e2-0c00-0000-0300-000000000000"
PAGE_BYTES = 64 * KIB


@dataclass
class ScriptedXpu:
    """The truth. reported: what mem_get_info says instead; "error": it raises."""

    total_bytes: int = 24 * GIB
    context_bytes: int = 200 * MIB
    neighbours_bytes: int = 0
    torch_bytes: int = 0
    handles: dict[int, int] = field(default_factory=dict)
    reported: int | str | None = None
    usable: int | str | None = "none"  # Level Zero's extension: "true", a number, or not there
    most_taken_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        """What is really free."""
        ours_bytes = self.context_bytes + self.torch_bytes + sum(self.handles.values())
        return self.total_bytes - ours_bytes - self.neighbours_bytes


class ScriptedXpuGraph:
    """torch.xpu.XPUGraph: takes no error mode."""

    def __init__(self, fails: dict[str, RuntimeError]) -> None:
        self._fails = fails

    def _step(self, name: str) -> None:
        if name in self._fails:
            raise self._fails.pop(name)

    def capture_begin(self, pool: object = None) -> None:
        assert pool is not None
        self._step("begin")

    def capture_end(self) -> None:
        self._step("end")

    def replay(self) -> None: ...


class XpuRuntime:
    """torch.xpu."""

    def __init__(self, device: ScriptedXpu, **properties: Any) -> None:
        self.device = device
        self.fraction = 1.0
        self.graph_fails: dict[str, RuntimeError] = {}
        self.pools = 0
        self.memory = SimpleNamespace()
        defaults = {
            "name": "Scripted Arc", "total_memory": device.total_bytes, "is_integrated_gpu": False, "driver_version": "1.6",
            "has_bfloat16_conversions": True, "has_fp16": True, "gpu_subslice_count": 20, "uuid": UUID,
        }  # fmt: skip
        self._properties = SimpleNamespace(**{**defaults, **properties})

    def get_device_properties(self, index: int) -> Any:
        return self._properties

    def set_device(self, index: int) -> None: ...

    def mem_get_info(self, index: int) -> tuple[int, int]:
        if self.device.reported == "error":
            raise RuntimeError("The device (Scripted Arc) doesn't support querying the available free memory.")
        if isinstance(self.device.reported, int):
            return self.device.reported, self.device.total_bytes
        return self.device.free_bytes, self.device.total_bytes

    def memory_reserved(self, index: int) -> int:
        return self.device.torch_bytes

    def max_memory_reserved(self, index: int) -> int:
        return max(self.device.torch_bytes, self.device.most_taken_bytes)

    def reset_peak_memory_stats(self, index: int) -> None:
        self.device.most_taken_bytes = self.device.torch_bytes

    def set_per_process_memory_fraction(self, fraction: float, index: int) -> None:
        assert 0 <= fraction <= 1
        self.fraction = fraction

    def empty_cache(self) -> None: ...

    def synchronize(self, index: int = 0) -> None: ...

    def Stream(self, device: int) -> object:
        return SimpleNamespace(device=device)

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        yield

    def graph_pool_handle(self) -> tuple[int, int]:
        self.pools += 1
        return 0, self.pools

    def XPUGraph(self) -> ScriptedXpuGraph:
        return ScriptedXpuGraph(self.graph_fails)

    def zeros(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Counts num_bytes while the (small) tensor lives."""
        assert device.type == "xpu"
        tensor = torch.zeros(16, dtype=torch.uint8)
        self._give(num_bytes)
        weakref.finalize(tensor, self._give, -num_bytes)
        return tensor

    def _give(self, num_bytes: int) -> None:
        self.device.torch_bytes += num_bytes
        self.device.most_taken_bytes = max(self.device.most_taken_bytes, self.device.torch_bytes)


class OldXpuRuntime(XpuRuntime):
    """Before torch 2.11: no graphs, and no limit on the allocator."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("XPUGraph", "graph_pool_handle", "set_per_process_memory_fraction"):
            raise AttributeError(name)
        return super().__getattribute__(name)


@dataclass
class ScriptedLevelZero:
    """The loader: one driver, two devices, the second is ours. codes: call -> error of every call."""

    device: ScriptedXpu
    codes: dict[str, int] = field(default_factory=dict)
    ranges: dict[int, int] = field(default_factory=dict)
    mapped: dict[int, tuple[int, int]] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("ze"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            if self.codes.get(name):
                return self.codes[name]
            return getattr(self, f"_{name}", lambda *_: 0)(*arguments) or 0

        return call

    def _zeDriverGet(self, count: Any, handles: Any) -> None:
        count._obj.value = 1
        if handles is not None:
            handles[0] = 11

    def _zeDeviceGet(self, driver: Any, count: Any, handles: Any) -> None:
        assert driver.value == 11
        count._obj.value = 2
        if handles is not None:
            handles[0], handles[1] = 21, 22

    def _zeDeviceGetProperties(self, device: Any, out: Any) -> None:
        properties = out._obj
        assert properties.stype == 0x3
        uuid = bytes.fromhex(UUID.replace("-", "")) if device.value == 22 else bytes(16)
        properties.uuid[:] = list(uuid)
        if properties.next and self.device.usable != "none":
            value = self.device.free_bytes if self.device.usable == "true" else int(self.device.usable or 0)
            ctypes.c_uint64.from_address(properties.next + 16).value = value  # after the structure's type and next

    def _zeVirtualMemQueryPageSize(self, context: Any, device: Any, size: Any, out: Any) -> None:
        assert context.value == 99 and device.value == 22
        out._obj.value = PAGE_BYTES

    def _zeVirtualMemReserve(self, context: Any, wanted: Any, size: Any, out: Any) -> None:
        assert size.value % PAGE_BYTES == 0
        out._obj.value = max(self.ranges, default=1 << 40) + (1 << 36)
        self.ranges[out._obj.value] = size.value

    def _zeVirtualMemFree(self, context: Any, address: Any, size: Any) -> None:
        assert self.ranges.pop(address.value) == size.value

    def _zePhysicalMemCreate(self, context: Any, device: Any, wanted: Any, out: Any) -> int:
        assert (wanted._obj.stype, wanted._obj.flags) == (0x20, 0)
        if wanted._obj.size > self.device.free_bytes:
            return 0x70000003
        out._obj.value = max(self.device.handles, default=1 << 20) + 1
        self.device.handles[out._obj.value] = wanted._obj.size
        return 0

    def _zePhysicalMemDestroy(self, context: Any, handle: Any) -> None:
        del self.device.handles[handle.value]

    def _zeVirtualMemMap(self, context: Any, address: Any, size: Any, handle: Any, offset: Any, access: Any) -> None:
        assert (offset.value, access.value) == (0, 1) and self.device.handles[handle.value] == size.value
        self.mapped[address.value] = (handle.value, size.value)

    def _zeVirtualMemUnmap(self, context: Any, address: Any, size: Any) -> None:
        assert self.mapped.pop(address.value)[1] == size.value


@dataclass
class OpenedXpu:
    """An XPU platform with what it stands on."""

    device: ScriptedXpu
    runtime: XpuRuntime
    loader: ScriptedLevelZero
    platform: XpuPlatform


def open_xpu_scripted(
    device: ScriptedXpu | None = None,
    root: Path = Path("/nonexistent"),
    *,
    context: int | None = 99,
    with_level_zero: bool = True,
    runtime_class: type[XpuRuntime] = XpuRuntime,
    codes: dict[str, int] | None = None,
    clients: DrmClients | None = None,
    **properties: Any,
) -> OpenedXpu:
    """properties: of torch's device; clients: the kernel's account, none where None."""
    device = device or ScriptedXpu()
    runtime, loader = runtime_class(device, **properties), ScriptedLevelZero(device, codes or {})
    level_zero = LevelZero(UUID, loader, context=context, wait=runtime.synchronize) if with_level_zero else None
    platform = XpuPlatform(0, runtime=runtime, level_zero=level_zero, clients=clients, root=root, zeros=runtime.zeros)
    return OpenedXpu(device, runtime, loader, platform)
