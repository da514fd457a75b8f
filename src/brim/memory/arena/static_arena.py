"""The fallback arena: one plain allocation at its final size, taken at construction, never growing or shrinking in bytes.

For devices without reserve and commit. Sizes are given at construction; `resize` only moves the line up to which blocks
may be used, and gives no memory back. Torch-free: the allocation comes from the caller.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from brim.errors import OutOfDeviceMemory
from brim.memory.arena.base import Account, Arena, no_account
from brim.units import format_bytes


@dataclass(frozen=True, slots=True)
class Allocation:
    """Memory at `address` that lives as long as `owner` does."""

    address: int
    owner: Any


Allocate = Callable[[int], Allocation]


def allocate_host(num_bytes: int) -> Allocation:
    """Zeroed host memory from the C library."""
    try:
        buffer = (ctypes.c_ubyte * num_bytes)()
    except (MemoryError, OverflowError) as error:
        raise OutOfDeviceMemory(f"{format_bytes(num_bytes)} of KV cache cannot be allocated.") from error
    ctypes.memset(buffer, 0, num_bytes)  # touch every page: what is allocated is resident
    return Allocation(ctypes.addressof(buffer), buffer)


class StaticArena(Arena):
    """All blocks are committed from construction to close."""

    def __init__(
        self, block_bytes: int, max_blocks: int, *, allocate: Allocate = allocate_host, account: Account = no_account
    ) -> None:
        super().__init__(block_bytes, max_blocks, 1, account)
        account(self.reserved_bytes)
        try:
            self._allocation: Allocation | None = allocate(self.reserved_bytes)
        except BaseException:
            account(-self.reserved_bytes)
            raise
        self._address = self._allocation.address
        self._committed_blocks = max_blocks

    @property
    def address(self) -> int:
        """First byte of the allocation."""
        return self._address

    @property
    def growable(self) -> bool:
        """Never."""
        return False

    @property
    def committed_bytes(self) -> int:
        """The whole allocation, whatever part of it is in use."""
        return 0 if self.closed else self.reserved_bytes

    def resize(self, num_blocks: int, *, keep_content: bool = True) -> None:
        """Move the line of usable blocks; the memory stays."""
        assert not self.closed, "a closed arena cannot be resized"
        assert 0 <= num_blocks <= self.max_blocks, f"{num_blocks} of {self.max_blocks} blocks"
        self._committed_blocks = num_blocks

    def _back(self, start_bytes: int, end_bytes: int) -> None:
        """Never needed."""

    def _unback(self, start_bytes: int, end_bytes: int) -> None:
        """Never needed."""

    def _release(self) -> None:
        self._allocation = None
