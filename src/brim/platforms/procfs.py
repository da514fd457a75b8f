"""Reads the numbers of /proc that memory accounting needs. Owns parsing; interprets nothing. The root is injectable."""

from __future__ import annotations

import re
from pathlib import Path

_FIELD = re.compile(r"^(\w+):[ \t]*([0-9]+) kB$", re.MULTILINE)


class ProcFiles:
    """/proc below a root. Every value is None where the file or the field is missing or not a number."""

    def __init__(self, root: Path) -> None:
        self._proc = root / "proc"

    def meminfo(self) -> dict[str, int]:
        """Fields of /proc/meminfo in bytes."""
        return _fields(read_text(self._proc / "meminfo"))

    def status(self) -> dict[str, int]:
        """Size fields of /proc/self/status in bytes: VmRSS, VmHWM, VmSize, VmData, RssAnon, RssFile, RssShmem."""
        return _fields(read_text(self._proc / "self" / "status"))

    def exact_rss_bytes(self) -> int | None:
        """Resident bytes summed over the page tables (smaps_rollup): exact, but costs time in proportion to them."""
        return _fields(read_text(self._proc / "self" / "smaps_rollup")).get("Rss")

    def reset_peak(self) -> bool:
        """Ask the kernel to set VmHWM to VmRSS; False where it refuses."""
        try:
            (self._proc / "self" / "clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def unbacked_bytes(self) -> int:
        """Private mappings without any permission: addresses reserved, not memory."""
        total = 0
        for line in (read_text(self._proc / "self" / "maps") or "").splitlines():
            span, _, rest = line.partition(" ")
            start, _, end = span.partition("-")
            if rest.startswith("---p"):
                total += int(end, 16) - int(start, 16)
        return total

    def loaded_library(self, name: str) -> str | None:
        """The file of a shared library that this process has mapped, by how the file's name begins."""
        for line in (read_text(self._proc / "self" / "maps") or "").splitlines():
            _, slash, path = line.partition("/")
            if slash and path.rpartition("/")[2].startswith(name):
                return slash + path
        return None

    def process_ids(self) -> list[int]:
        """Every process that is to be seen from here."""
        try:
            return sorted(int(entry.name) for entry in self._proc.iterdir() if entry.name.isdecimal())
        except OSError:
            return []

    def process_name(self, pid: int) -> str | None:
        """What it calls itself; None where it is not to be seen from here (another PID namespace)."""
        return (read_text(self._proc / str(pid) / "comm") or "").strip() or None

    def parent_id(self, pid: int) -> int | None:
        """Who started it, as far as that lives."""
        found = re.search(r"^PPid:\s*(\d+)$", read_text(self._proc / str(pid) / "status") or "", re.MULTILINE)
        return int(found.group(1)) if found else None

    def cpu_model(self) -> str:
        """The processor's name; "unknown" where /proc/cpuinfo does not say."""
        return self._cpu_field("model name") or self._cpu_field("Model") or "unknown"

    def cpu_flags(self) -> frozenset[str]:
        """Instruction set flags of the first core."""
        return frozenset((self._cpu_field("flags") or self._cpu_field("Features") or "").split())

    def _cpu_field(self, name: str) -> str | None:
        for line in (read_text(self._proc / "cpuinfo") or "").splitlines():
            key, colon, value = line.partition(":")
            if colon and key.strip() == name:
                return value.strip()
        return None


def read_text(path: Path) -> str | None:
    """The file's text, or None where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return None


def _fields(text: str | None) -> dict[str, int]:
    """`Name:  123 kB` lines in bytes; lines of another form are skipped."""
    return {key: int(value) * 1024 for key, value in _FIELD.findall(text or "")}
