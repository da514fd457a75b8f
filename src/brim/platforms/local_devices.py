"""The accelerators of this machine and who holds their memory, asked of the management libraries. Owns the list. Torch-free.

No context is created, so that looking takes no memory. A figure that a library does not give is None, never a guess: in a
container processes are often not listed, and what they hold shows as what nobody is named for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brim.platforms import amdsmi, level_zero, nvml
from brim.platforms.amdsmi import Amdsmi
from brim.platforms.drm_clients import DrmClients
from brim.platforms.nvml import Nvml
from brim.platforms.procfs import ProcFiles


@dataclass(frozen=True, slots=True)
class DeviceProcess:
    """A process that holds num_bytes of a device. name, parent_pid: where it is to be seen from here."""

    pid: int
    num_bytes: int
    name: str | None = None
    parent_pid: int | None = None


@dataclass(frozen=True, slots=True)
class LocalDevice:
    """One card. platform, index: as the platform counts. processes: largest first; None: the library lists none."""

    platform: str
    index: int
    name: str
    total_bytes: int | None
    free_bytes: int | None
    processes: tuple[DeviceProcess, ...] | None

    @property
    def used_bytes(self) -> int | None:
        """By anybody, the driver included."""
        return None if self.total_bytes is None or self.free_bytes is None else self.total_bytes - self.free_bytes

    @property
    def unnamed_bytes(self) -> int | None:
        """Used, but by nobody who is listed: the driver, graphics, and processes that cannot be seen from here."""
        if self.used_bytes is None:
            return None
        return max(0, self.used_bytes - sum(process.num_bytes for process in self.processes or ()))


def nvml_devices(library: Any, root: Path = Path("/")) -> Iterator[LocalDevice]:
    """Every NVIDIA card; library: pynvml."""
    return _cards("cuda", nvml.list_cards(library), root)


def amdsmi_devices(library: Any, root: Path = Path("/")) -> Iterator[LocalDevice]:
    """Every AMD card; library: amdsmi."""
    return _cards("rocm", amdsmi.list_cards(library), root)


def level_zero_devices(library: Any, root: Path = Path("/")) -> Iterator[LocalDevice]:
    """Every Intel device; library: the Level Zero loader, which says what is free and not the total.

    Processes are the kernel's account, of those this user may look into, and only where there is one card: the loader does
    not say which address is whose.
    """
    cards = level_zero.list_cards(library)
    held = _drm_held(root) if len(cards) == 1 else {}
    for index, (name, card) in enumerate(cards):
        processes = _processes(next(iter(held.values())), root) if len(held) == 1 else None
        yield LocalDevice("xpu", index, name or "?", None, card.usable_bytes(), processes)


def _cards(platform: str, cards: Sequence[Nvml | Amdsmi], root: Path) -> Iterator[LocalDevice]:
    for index, card in enumerate(cards):
        held = card.process_bytes()
        yield LocalDevice(platform, index, card.name() or "?", card.total_bytes(), card.free_bytes(), _processes(held, root))


def _processes(held: Mapping[int, int] | None, root: Path) -> tuple[DeviceProcess, ...] | None:
    if held is None:
        return None
    files = ProcFiles(root)
    found = (DeviceProcess(pid, held[pid], files.process_name(pid), files.parent_id(pid)) for pid in held)
    return tuple(sorted(found, key=lambda one: (-one.num_bytes, one.pid)))


def _drm_held(root: Path) -> dict[str, dict[int, int]]:
    """Bytes by the device's address and the process."""
    held: dict[str, dict[int, int]] = {}
    for pid in ProcFiles(root).process_ids():
        for address, num_bytes in DrmClients(root, pid).held_bytes().items():
            if num_bytes:
                held.setdefault(address, {})[pid] = num_bytes
    return held
