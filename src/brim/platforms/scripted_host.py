"""The files by which a kernel tells of a scripted host: /proc and its control group, in a folder of their own. Owns their text.

Where a device's memory is the host's, the script's total is what is installed and every take of the device is resident.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path

from brim.platforms.scripted_device import ScriptedDevice

_WSL = "Linux version 5.15.90.1-microsoft-standard-WSL2"
_LINUX = "Linux version 6.8.0"


class ScriptedHost:
    """`root` goes with the last reference. `tell` writes what is true now."""

    def __init__(self, device: ScriptedDevice) -> None:
        self._device = device
        self.root = Path(tempfile.mkdtemp(prefix="brim-scenario-"))
        weakref.finalize(self, shutil.rmtree, self.root, ignore_errors=True)
        self._peak_bytes = 0
        (self.root / "proc/self").mkdir(parents=True)
        self._write("proc/version", _WSL if device.script.is_wsl else _LINUX)
        self._write("proc/self/clear_refs", "")
        self._told: dict[str, str] = {}
        if device.script.host.group_bytes:
            (self.root / "sys/fs/cgroup").mkdir(parents=True)
            self._write("sys/fs/cgroup/cgroup.controllers", "memory")
            self._write("sys/fs/cgroup/memory.max", str(device.script.host.group_bytes))
            self._write("proc/self/cgroup", "0::/")
        self.tell()

    def tell(self) -> None:
        """Write every file that changes."""
        device, host = self._device, self._device.script.host
        ours_bytes = device.ours_bytes
        self._peak_bytes = max(self._peak_bytes, device.most_ours_bytes)
        total_bytes = host.total_bytes or device.total_bytes
        available_bytes = max(0, total_bytes - host.used_bytes - ours_bytes - device.neighbours_bytes)
        free_bytes = max(0, available_bytes - host.page_cache_bytes)
        kib = {"MemTotal": total_bytes, "MemFree": free_bytes, "MemAvailable": available_bytes, "Cached": host.page_cache_bytes}
        self._tell("proc/meminfo", "".join(f"{name}: {value // 1024} kB\n" for name, value in kib.items()))
        self._tell("proc/self/status", f"VmHWM: {self._peak_bytes // 1024} kB\nVmRSS: {ours_bytes // 1024} kB\n")
        if host.group_bytes:
            self._tell("sys/fs/cgroup/memory.current", str(ours_bytes + host.page_cache_bytes))
            self._tell("sys/fs/cgroup/memory.stat", f"inactive_file {host.page_cache_bytes}\n")

    def reset_peak(self) -> None:
        """The kernel's high-water mark is what is resident now."""
        self._device.most_ours_bytes = self._peak_bytes = self._device.ours_bytes
        self.tell()

    def _tell(self, name: str, text: str) -> None:
        if self._told.get(name) != text:
            self._told[name] = text
            self._write(name, text)

    def _write(self, name: str, text: str) -> None:
        (self.root / name).write_text(text, encoding="utf-8")
