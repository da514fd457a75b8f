"""What a process holds on each graphics device by the kernel's own account. Owns the reading of /proc/PID/fdinfo.

Each open file of a device that does so shows one client's memory by region. Regions of the device's own memory are called vram0,
vram1 (xe), local0 (i915) and vram (amdgpu). Files opened more than once show the same client, which counts once.
Source: Linux kernel documentation, "DRM client usage stats" and "Xe DRM client usage stats implementation".
"""

from __future__ import annotations

import re
from pathlib import Path

from brim.platforms.procfs import read_text

_OWN_MEMORY = re.compile(r"^drm-(resident|total)-((?:vram|local)\d*):\s*(\d+)\s*(KiB|MiB)?\s*$", re.MULTILINE)
_UNIT_BYTES = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20}


class DrmClients:
    """root is where /proc is looked for; process: this one, or another that this user may look into."""

    def __init__(self, root: Path = Path("/"), process: int | str = "self") -> None:
        self._files = root / f"proc/{process}/fd"
        self._infos = root / f"proc/{process}/fdinfo"

    def held_bytes(self) -> dict[str, int]:
        """Bytes by the device's address, such as 0000:03:00.0. Devices of which no file is open, or whose driver shows no
        memory, are missing."""
        held: dict[tuple[str, str], int] = {}
        for name in self._device_files():
            text = read_text(self._infos / name) or ""
            device, client = _value(text, "drm-pdev"), _value(text, "drm-client-id")
            memory = _memory(text)
            if device and client and memory is not None:
                held[device, client] = memory
        by_device: dict[str, int] = {}
        for (device, _), num_bytes in held.items():
            by_device[device] = by_device.get(device, 0) + num_bytes
        return by_device

    def _device_files(self) -> list[str]:
        try:
            return [file.name for file in self._files.iterdir() if _leads_to(file).startswith("/dev/dri/")]
        except OSError:
            return []


def _leads_to(file: Path) -> str:
    try:
        return str(file.readlink())
    except OSError:  # closed since the folder was listed
        return ""


def _value(text: str, key: str) -> str:
    found = re.search(rf"^{key}:\s*(\S+)", text, re.MULTILINE)
    return found.group(1) if found else ""


def _memory(text: str) -> int | None:
    """What is resident in the device's own regions; what was allocated there, where a driver shows only that; None: neither."""
    regions: dict[str, dict[str, int]] = {}
    for kind, region, number, unit in _OWN_MEMORY.findall(text):
        regions.setdefault(region, {})[kind] = int(number) * _UNIT_BYTES[unit]
    return sum(kinds.get("resident", kinds.get("total", 0)) for kinds in regions.values()) if regions else None
