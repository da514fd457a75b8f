"""Memory limits of the control groups this process is in. Owns finding and reading them: v2, v1, hybrid, nested, namespaced.

A limit anywhere on the way up to the mount point binds us, so all of them are read. Page cache that the kernel would drop
first (inactive_file) is not used memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from brim.platforms.procfs import read_text

UNLIMITED_BYTES = 1 << 60  # version 1 writes "no limit" as 2**63 less a page


@dataclass(frozen=True, slots=True)
class CgroupLimit:
    """One limit that binds us. used_bytes: charged to the group less reclaimable cache; None where the kernel does not say."""

    limit_bytes: int
    used_bytes: int | None
    source: str


@dataclass(frozen=True, slots=True)
class _Group:
    """A directory and the names of its files."""

    path: Path
    version: int


class CgroupMemory:
    """The groups of this process from the innermost outwards; found once, read at every call."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._groups = [*self._find(2), *self._find(1)]

    def limits(self) -> tuple[list[CgroupLimit], list[str]]:
        """Every limit that applies now, and a complaint for each file whose content makes no sense."""
        limits: list[CgroupLimit] = []
        complaints: list[str] = []
        for group in self._groups:
            names = ("memory.max", "memory.high") if group.version == 2 else ("memory.limit_in_bytes",)
            for name in names:
                text = read_text(group.path / name)
                if text is None or text.strip() in {"max", "-1"}:
                    continue
                limit_bytes = _number(text)
                where = f"/{(group.path / name).relative_to(self._root)}"
                if limit_bytes is None or limit_bytes == 0:
                    complaints.append(f"{where} says '{text.strip()[:40]}'")
                elif limit_bytes < UNLIMITED_BYTES:
                    used_bytes = self._used_bytes(group)
                    if used_bytes is None:
                        complaints.append(f"{where} has a limit but no readable usage beside it")
                    limits.append(CgroupLimit(limit_bytes, used_bytes, f"cgroup limit {where}"))
        return limits, complaints

    def cpu_quota(self) -> float | None:
        """Processors' worth of time that the innermost quota of version 2 allows; None without one."""
        quotas = []
        for group in self._groups:
            parts = (read_text(group.path / "cpu.max") or "").split()
            if len(parts) == 2 and parts[0].isdecimal() and parts[1].isdecimal() and int(parts[1]):
                quotas.append(int(parts[0]) / int(parts[1]))
        return min(quotas, default=None)

    @staticmethod
    def _used_bytes(group: _Group) -> int | None:
        usage_bytes = _number(read_text(group.path / ("memory.current" if group.version == 2 else "memory.usage_in_bytes")))
        if usage_bytes is None:
            return None
        key = "inactive_file" if group.version == 2 else "total_inactive_file"
        for line in (read_text(group.path / "memory.stat") or "").splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return max(0, usage_bytes - (_number(value) or 0))
        return usage_bytes

    def _find(self, version: int) -> list[_Group]:
        """Directories from ours up to the mount point."""
        inside = self._path_in_hierarchy(version)
        mount = self._mount(version)
        if inside is None or mount is None:
            return []
        mount_root, mount_point = mount
        # A mount may show only a part of the hierarchy (a container without its own namespace): strip that part.
        if mount_root != "/" and (inside == mount_root or inside.startswith(mount_root + "/")):
            inside = inside[len(mount_root) :]
        parts = [part for part in inside.split("/") if part and part != ".."]
        if ".." in inside.split("/"):
            parts = []  # we live above what our namespace shows: only the mount point can be read
        chain = [mount_point.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
        return [_Group(path, version) for path in chain if path.is_dir()]

    def _path_in_hierarchy(self, version: int) -> str | None:
        for line in (read_text(self._root / "proc/self/cgroup") or "").splitlines():
            number, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if version == 2 and number == "0" and controllers == "":
                return path
            if version == 1 and "memory" in controllers.split(","):
                return path
        return None

    def _mount(self, version: int) -> tuple[str, Path] | None:
        """(part of the hierarchy that is mounted, where), from mountinfo; the usual places where that cannot be read."""
        text = read_text(self._root / "proc/self/mountinfo")
        for line in (text or "").splitlines():
            left, dash, right = line.partition(" - ")
            fields, kind = left.split(), right.split()
            if not dash or len(fields) < 5 or len(kind) < 3:
                continue
            wanted = "cgroup2" if version == 2 else "cgroup"
            if kind[0] == wanted and (version == 2 or "memory" in kind[2].split(",")):
                return fields[3], self._root / fields[4].lstrip("/")
        if text is not None:
            return None
        usual = ("sys/fs/cgroup", "sys/fs/cgroup/unified") if version == 2 else ("sys/fs/cgroup/memory",)
        found = next((self._root / place for place in usual if self._is_group(self._root / place, version)), None)
        return ("/", found) if found else None

    @staticmethod
    def _is_group(path: Path, version: int) -> bool:
        names = ("cgroup.controllers", "memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes",)
        return any((path / name).exists() for name in names)


def _number(text: str | None) -> int | None:
    stripped = (text or "").strip()
    return int(stripped) if stripped.isdecimal() else None
