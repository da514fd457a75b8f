"""What this process holds on an accelerator. Owns the choice between the driver's list of processes and our own account.

The list is exact, but it must be ours: in a container with process ids of its own our number may be missing, or be somebody
else's there. So the list is read before and after our context appears. Our id is believed where it is new; where it is
missing, a single new process that holds just what the device lost meanwhile is this one under the host's number.

Without the list: the context as measured, what torch reserved, the arenas, and a remainder: what the device lost beyond
these and beyond what listed neighbours took (kernel images, graphs). A neighbour that no list shows cannot be told from
us, so the remainder is bounded: such a neighbour is charged to us with MOST_REMAINDER_BYTES at the very most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from brim.units import GIB, MIB

CONTEXT_BYTES = 640 * MIB  # measured on an H100: 518 to 621 MiB
MOST_REMAINDER_BYTES = GIB  # kernel images and some hundred graphs take 100 to 300 MiB
_LIKELY_CONTEXT_BYTES = range(32 * MIB, 2 * GIB)  # anything else is a neighbour's move
_SAME_BYTES = 64 * MIB  # two figures of the same process, read one after the other


class ManagementLibrary(Protocol):
    """What a vendor's management library says of one device; see nvml and amdsmi. A figure that cannot be had is None."""

    def free_bytes(self) -> int | None: ...
    def is_of(self, total_bytes: int) -> bool: ...
    def process_bytes(self) -> dict[int, int] | None: ...


class ProcessShare:
    """Made around the creation of the context.

    create_context returns (free, total) bytes as the runtime reports them; reserved_bytes is what torch's allocator holds.
    context_exists: somebody in this process used the device before. steady_free False: free memory also moves with the
    host's page cache (integrated devices), so nothing is derived from it.
    """

    def __init__(
        self,
        pid: int,
        library: ManagementLibrary | None,
        create_context: Callable[[], tuple[int, int]],
        reserved_bytes: Callable[[], int],
        *,
        context_exists: bool = False,
        steady_free: bool = True,
    ) -> None:
        self._library = library
        self._reserved_bytes = reserved_bytes
        self._steady_free = steady_free
        before_bytes, listed_before = self._library_free(), self._list()
        self._free_at_open_bytes, total_bytes = create_context()
        after_bytes, listed = self._library_free(), self._list()
        self._reserved_at_open_bytes = reserved_bytes()
        self.free_before_bytes, self.free_after_bytes = before_bytes, after_bytes
        measured = before_bytes is not None and after_bytes is not None and not context_exists
        if library is not None and not library.is_of(total_bytes):
            measured = False  # the library speaks of the whole card, we of a slice
        lost_bytes = (before_bytes or 0) - (after_bytes or 0) if measured else None
        self._pid = _find_ourselves(pid, listed_before, listed, lost_bytes, context_exists)
        self._may_be_us = set() if self._pid is not None else _who_may_be_us(pid, listed_before, listed, context_exists)
        self._neighbours_bytes = 0
        self._neighbours_at_open_bytes = self._neighbours(listed)
        self.context_is_measured = True
        if self._pid is not None and listed is not None:
            self.context_bytes = max(0, listed[self._pid] - self._reserved_at_open_bytes)
        else:
            own_bytes = -1 if lost_bytes is None else lost_bytes - _growth(listed_before, listed)
            self.context_is_measured = own_bytes in _LIKELY_CONTEXT_BYTES
            self.context_bytes = own_bytes if self.context_is_measured else CONTEXT_BYTES
        self.source = "own account"
        if self._pid is not None:
            self.source = "list of processes" + ("" if self._pid == pid else f", as process {self._pid} of the host")

    @property
    def is_listed(self) -> bool:
        """The list of processes tells what is ours."""
        return self._pid is not None

    def read(self, free_bytes: int, arena_bytes: int) -> tuple[int, str]:
        """What this process holds, and why the figure comes from another source than at open ("" where it does not)."""
        if self._pid is None:
            return self.own_account(free_bytes, arena_bytes), ""
        held_bytes = (self._list() or {}).get(self._pid, 0)
        if held_bytes:
            return held_bytes, ""
        return self.own_account(free_bytes, arena_bytes), "the management library no longer lists this process"

    def own_account(self, free_bytes: int, arena_bytes: int) -> int:
        """Without the list. free_bytes: of the device now; arena_bytes: arenas whose memory is not torch's.

        Example: a context of 500 MiB, 2 GiB reserved, 6 GiB of arenas, and the device lost 8.1 GiB since open: 8.6 GiB.
        """
        reserved_bytes = self._reserved_bytes()
        known_bytes = self.context_bytes + reserved_bytes + arena_bytes
        if not self._steady_free:
            return known_bytes
        grown_bytes = self._neighbours(self._list()) - self._neighbours_at_open_bytes
        lost_bytes = self._free_at_open_bytes - free_bytes - grown_bytes
        remainder_bytes = lost_bytes - (reserved_bytes - self._reserved_at_open_bytes) - arena_bytes
        return known_bytes + min(max(0, remainder_bytes), MOST_REMAINDER_BYTES)

    def _neighbours(self, listed: dict[int, int] | None) -> int:
        """Bytes of those who are certainly not this process; as they were seen last, where there is no list."""
        if listed is not None and self._may_be_us is not None:
            ours = {self._pid, *self._may_be_us}
            self._neighbours_bytes = sum(held for pid, held in listed.items() if pid not in ours)
        return self._neighbours_bytes

    def _library_free(self) -> int | None:
        return self._library.free_bytes() if self._library else None

    def _list(self) -> dict[int, int] | None:
        return self._library.process_bytes() if self._library else None


def _growth(before: dict[int, int] | None, after: dict[int, int] | None) -> int:
    return sum((after or {}).values()) - sum((before or {}).values())


def _who_may_be_us(
    pid: int, before: dict[int, int] | None, after: dict[int, int] | None, context_exists: bool
) -> set[int] | None:
    """Numbers that may be ours where none is for certain, so that our growth is never taken for a neighbour's. None: any."""
    if before is None or after is None:
        return None
    return {pid, *after} if context_exists else {pid, *after} - before.keys()


def _find_ourselves(
    pid: int,
    before: dict[int, int] | None,
    after: dict[int, int] | None,
    lost_bytes: int | None,
    context_exists: bool,
) -> int | None:
    """Our number in the list; None where no entry is ours for certain."""
    if before is None or after is None:
        return None
    if after.get(pid) and (context_exists or pid not in before):
        return pid
    new = after.keys() - before.keys()
    if len(new) != 1 or lost_bytes is None:
        return None
    found = new.pop()
    neighbours_bytes = _growth(before, after) - after[found]
    return found if abs(lost_bytes - neighbours_bytes - after[found]) <= _SAME_BYTES else None
