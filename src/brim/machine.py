"""What this machine has, for who only looks: its accelerators and who holds them. The composition root of that, without torch
and without an engine (`runtime` needs seconds to import). Owns which libraries are there to ask."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from typing import Any

from brim.platforms import level_zero
from brim.platforms.local_devices import LocalDevice, amdsmi_devices, level_zero_devices, nvml_devices


def local_devices() -> list[dict[str, Any]]:
    """Every accelerator as plain JSON values; libraries that are not installed are not asked."""
    return [as_json(device) for device in _devices()]


def as_json(device: LocalDevice) -> dict[str, Any]:
    """All fields, and those that follow from them."""
    return {**asdict(device), "used_bytes": device.used_bytes, "unnamed_bytes": device.unnamed_bytes}


def _devices() -> Iterator[LocalDevice]:
    for name, ask in (("pynvml", nvml_devices), ("amdsmi", amdsmi_devices)):
        try:
            library = import_module(name)
        except (ImportError, OSError, KeyError):  # amdsmi raises these where its own library is missing
            continue
        yield from ask(library)
    if level_zero.is_device_present():
        try:
            loader = ctypes.CDLL("libze_loader.so.1")
        except OSError:
            return
        yield from level_zero_devices(loader)
