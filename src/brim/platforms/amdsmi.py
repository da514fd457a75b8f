"""What AMD's management library says of one device: memory without a context, and each process's share. Owns its errors.

Every figure is optional, as the library's parts differ by version, by permission and in containers: a figure that cannot be had
is None, never a guess. Written against the documentation; never run on the hardware.
Source: AMD SMI Python API (amdsmi_get_gpu_memory_usage, amdsmi_get_gpu_memory_total, amdsmi_get_gpu_process_list).
"""

from __future__ import annotations

from typing import Any

_TOTAL_TOLERANCE = 20  # one part in: a partition of a card is at most half of it


class Amdsmi:
    """One device by its bus id; without one (""), only where there is no other. `library` is amdsmi, or a scripted stand-in."""

    def __init__(self, bus_id: str, library: Any) -> None:
        self._library = library
        self._handle: Any = None
        try:
            library.amdsmi_init()
        except Exception:  # the library's own errors, and whatever a missing driver makes of it
            return
        handles = self._ask("amdsmi_get_processor_handles") or []
        matching = [handle for handle in handles if str(self._ask("amdsmi_get_gpu_device_bdf", handle)).lower() == bus_id]
        if len(matching) == 1 or (not bus_id and len(handles) == 1):
            self._handle = (matching or handles)[0]

    def _ask(self, name: str, *arguments: Any) -> Any:
        """The call's result; None where this version has no such call, or it does not answer."""
        try:
            return getattr(self._library, name)(*arguments)
        except Exception:  # AmdSmiException, and what a changed signature raises
            return None

    @property
    def works(self) -> bool:
        """The device was found."""
        return self._handle is not None

    def _memory(self, name: str) -> int | None:
        if not self.works:
            return None
        kind = getattr(getattr(self._library, "AmdSmiMemoryType", None), "VRAM", None)
        return _size(self._ask(name, self._handle, kind))

    def name(self) -> str | None:
        """The product's name."""
        answer = self._ask("amdsmi_get_gpu_asic_info", self._handle) if self.works else None
        text = answer.get("market_name") if isinstance(answer, dict) else None
        return text if isinstance(text, str) and text not in ("", "N/A") else None

    def total_bytes(self) -> int | None:
        """The device's memory."""
        return self._memory("amdsmi_get_gpu_memory_total")

    def free_bytes(self) -> int | None:
        """Total less what is used by anybody; needs no context of our own."""
        total_bytes, used_bytes = self.total_bytes(), self._memory("amdsmi_get_gpu_memory_usage")
        if not total_bytes or used_bytes is None or used_bytes > total_bytes:
            return None
        return total_bytes - used_bytes

    def is_of(self, total_bytes: int) -> bool:
        """Whether the library's total is that of the device that HIP calls total_bytes large, not of the card it is a part of."""
        total = self.total_bytes()
        return total is not None and abs(total - total_bytes) * _TOTAL_TOLERANCE <= total_bytes

    def process_bytes(self) -> dict[int, int] | None:
        """Bytes of device memory by process id, of those whose bytes are known; None where no processes are listed."""
        listed = self._ask("amdsmi_get_gpu_process_list", self._handle) if self.works else None
        if not isinstance(listed, list):
            return None
        found: dict[int, int] = {}
        for process in listed:
            if not isinstance(process, dict):  # releases before 6.0 list handles
                return None
            pid = _size(process.get("pid"))
            usage = process.get("memory_usage")
            held_bytes = _size(usage.get("vram_mem")) if isinstance(usage, dict) else None
            held_bytes = held_bytes or _size(process.get("mem"))
            if pid is not None and held_bytes:
                found[pid] = held_bytes
        return found

    def driver_version(self) -> str | None:
        """As the library writes it."""
        answer = self._ask("amdsmi_get_gpu_driver_info", self._handle) if self.works else None
        text = answer.get("driver_version") if isinstance(answer, dict) else None
        return text if isinstance(text, str) and text not in ("", "N/A") else None


def list_cards(library: Any) -> list[Amdsmi]:
    """Every device of this machine, in the library's order; none where it does not answer."""
    try:
        library.amdsmi_init()
        buses = [str(library.amdsmi_get_gpu_device_bdf(handle)).lower() for handle in library.amdsmi_get_processor_handles()]
    except Exception:  # the library's own errors, and whatever a missing driver makes of it
        return []
    return [Amdsmi(bus, library) for bus in buses]


def _size(value: object) -> int | None:
    """A whole number that is not negative; None for anything else ("N/A" where a figure is not known)."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
