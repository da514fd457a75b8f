"""The CPU platform: device memory is the host's. Owns which limits bind this process and what it holds.

Total is the least of the installed memory, every control group limit and the process's resource limits. Free counts page
cache as free, because the kernel gives it back. Ours is the resident set; its peak is the kernel's high-water mark.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import platform as host
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import psutil

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]

from brim.platforms.base import Capabilities, MemoryReading, Platform, PlatformDefaults, default_reserve_bytes
from brim.platforms.cgroup import CgroupMemory
from brim.platforms.procfs import ProcFiles, read_text
from brim.units import MIB

# Interpreter, torch 2.13 and the engine: 221 MiB resident after imports and 17 MiB more after the first product, measured
# on x86-64 Linux; rounded up. Only planning without a process of its own uses it.
CONTEXT_BYTES = 256 * MIB
_PEAK_SLACK_BYTES = 16 * MIB
_HUGE_PAGE_BYTES = 2 * MIB


class CpuPlatform(Platform):
    """`root` is where /proc and /sys are looked for; `rlimit` gives the soft limit of a resource by name, None if unlimited."""

    name = "cpu"

    def __init__(self, root: Path = Path("/"), rlimit: Callable[[str], int | None] | None = None) -> None:
        super().__init__()
        self._proc = ProcFiles(root)
        self._cgroup = CgroupMemory(root)
        self._rlimit = rlimit or _soft_limit
        self._peak_floor_bytes = 0  # VmHWM at the last reset, where the kernel would not reset it
        self._peak_resets = True
        self._sampled_peak_bytes = 0
        flags = self._proc.cpu_flags()
        native_bf16 = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
        self.capabilities = Capabilities(
            host_memory=True,
            reserve_commit=os.name == "posix",
            arena_backend="mmap" if os.name == "posix" else "static",
            granularity_bytes=_HUGE_PAGE_BYTES if _offers_huge_pages(root) else mmap.PAGESIZE,
            graphs=False,
            graph_modes=("NONE",),
            trusted_readings=True,
            resettable_peak=True,
            cap_enforced=False,
            over_allocation_kills=True,
            async_tokens=False,
            dtypes=("bfloat16", "float32") if native_bf16 else ("float32", "bfloat16"),
        )

    def reading(self) -> MemoryReading:
        """The least limit decides; page cache counts as free. Costs about 0.1 ms: poll it, not every step."""
        complaints: list[str] = []
        total_bytes, free_bytes, source = self._installed(complaints)
        status = self._proc.status()
        ours_bytes = self._ours(status, complaints)
        limits, cgroup_complaints = self._cgroup.limits()
        complaints += cgroup_complaints
        for limit in limits:
            used_bytes = ours_bytes if limit.used_bytes is None else limit.used_bytes
            free_bytes = min(free_bytes, max(0, limit.limit_bytes - used_bytes))
            if limit.limit_bytes < total_bytes:
                total_bytes, source = limit.limit_bytes, limit.source
        for name, field in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
            limit_bytes = self._rlimit(name)
            if limit_bytes is None:
                continue
            taken_bytes = status.get(field, ours_bytes)
            if field == "VmSize":  # reserved addresses are ours to fill
                taken_bytes = max(ours_bytes, taken_bytes - self._proc.unbacked_bytes())
            free_bytes = min(free_bytes, max(0, limit_bytes - taken_bytes))
            if limit_bytes < total_bytes:
                total_bytes, source = limit_bytes, f"process limit {name}"
        if free_bytes > total_bytes:
            complaints.append(f"{free_bytes} bytes free of {total_bytes}")
            free_bytes = max(0, total_bytes - ours_bytes)
        self._sampled_peak_bytes = max(self._sampled_peak_bytes, ours_bytes)
        return MemoryReading(
            total_bytes=total_bytes,
            free_bytes=free_bytes,
            ours_bytes=ours_bytes,
            others_bytes=max(0, total_bytes - free_bytes - ours_bytes),
            limit_source=source,
            trusted=not complaints,
            reason="; ".join(complaints),
        )

    def reset_peak(self) -> None:
        """Sets the kernel's high-water mark to now; where it refuses, readings from now on are the samples."""
        before = self._proc.status()
        asked = self._proc.reset_peak()
        after = self._proc.status()
        peak_bytes, now_bytes = after.get("VmHWM"), after.get("VmRSS", 0)
        reached_bytes = max(now_bytes, before.get("VmRSS", 0)) + _PEAK_SLACK_BYTES
        self._peak_resets = asked and peak_bytes is not None and peak_bytes <= reached_bytes
        self._peak_floor_bytes = 0 if self._peak_resets else peak_bytes or 0
        self._sampled_peak_bytes = now_bytes or self.reading().ours_bytes

    def peak_ours_bytes(self) -> int:
        """VmHWM. Where it could not be reset it still counts once it rises above its value at the reset."""
        now_bytes = self.reading().ours_bytes
        peak_bytes = self._proc.status().get("VmHWM", 0)
        if peak_bytes > self._peak_floor_bytes:
            return max(peak_bytes, now_bytes)
        return max(self._sampled_peak_bytes, now_bytes)

    def synchronize(self) -> None:
        """Nothing is queued on a CPU."""

    def release_unused(self) -> int:
        """Collects garbage and makes the C library give free pages back.

        What survives is frozen: it was built for good, and later collections, this one's successors included, skip it.
        """
        before_bytes = self.reading().ours_bytes
        gc.collect()
        gc.freeze()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        return max(0, before_bytes - self.reading().ours_bytes)

    def default_limits(self) -> PlatformDefaults:
        """See host_defaults."""
        return host_defaults(self.reading().free_bytes)

    @property
    def usable_cores(self) -> int:
        """Cores this process may run on: its affinity, less where a control group's quota is smaller."""
        affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        quota = self._cgroup.cpu_quota()
        return affinity if quota is None else max(1, min(affinity, int(quota)))

    def describe(self) -> dict[str, object]:
        """Processor, cores, kernel, versions and the limit that binds."""
        now = self.reading()
        return {
            "platform": self.name,
            "device": self._proc.cpu_model(),
            "cores": self.usable_cores,
            "system": f"{host.system()} {host.release()} {host.machine()}",
            "python": host.python_version(),
            "torch": version("torch"),
            "total_bytes": now.total_bytes,
            "limit_source": now.limit_source,
            "trusted_readings": now.trusted,
        }

    def _installed(self, complaints: list[str]) -> tuple[int, int, str]:
        """(total, available, source) of the machine."""
        meminfo = self._proc.meminfo()
        total_bytes, available_bytes = meminfo.get("MemTotal"), meminfo.get("MemAvailable")
        if not total_bytes:
            memory = psutil.virtual_memory()
            return memory.total, memory.available, "installed memory"
        if available_bytes is None:
            complaints.append("/proc/meminfo has no MemAvailable")
            cache_bytes = meminfo.get("Cached", 0) + meminfo.get("Buffers", 0) - meminfo.get("Shmem", 0)
            available_bytes = meminfo.get("MemFree", 0) + max(0, cache_bytes)
        return total_bytes, available_bytes, "installed memory"

    def _ours(self, status: dict[str, int], complaints: list[str]) -> int:
        resident_bytes = status.get("VmRSS")
        if resident_bytes is None:
            resident_bytes = int(psutil.Process().memory_info().rss)
            if self._proc.meminfo():
                complaints.append("/proc/self/status has no VmRSS")
        return resident_bytes


def host_defaults(free_bytes: int) -> PlatformDefaults:
    """Small batches, contexts up to 4,096 and no more memory than they need: a host is shared."""
    return PlatformDefaults(
        max_num_seqs=16,
        max_num_batched_tokens=256,
        max_model_len_cap=4096,
        memory="enough",
        reserve_bytes=default_reserve_bytes(free_bytes),
        context_bytes=CONTEXT_BYTES,
    )


def _offers_huge_pages(root: Path) -> bool:
    """Whether the kernel backs memory with huge pages where it is asked to (7 times faster to commit, 26 to uncommit)."""
    modes = read_text(root / "sys/kernel/mm/transparent_hugepage/enabled") or ""
    return "[always]" in modes or "[madvise]" in modes


def _soft_limit(name: str) -> int | None:
    """The process's soft limit in bytes; None where there is none."""
    kind = getattr(resource, name, None)
    if resource is None or kind is None:
        return None
    soft: int = resource.getrlimit(kind)[0]
    return None if soft == resource.RLIM_INFINITY else soft
