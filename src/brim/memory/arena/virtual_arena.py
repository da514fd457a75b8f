"""The arena over a driver's virtual memory: an address range, backed by few large handles. Owns which handle lies where.

A handle is mapped whole and unmapped whole: some devices reject parts, and each handle costs a call. Measured on one H100: 2 MiB
handles commit at 50 GiB/s, 256 MiB handles at 5,000 GiB/s, so 62 GiB take 12 ms and giving back is still fine enough.
A smaller range has smaller handles, 64 of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from brim.errors import BrimError
from brim.memory.arena.base import Account, Arena, no_account
from brim.units import MIB, round_up

HANDLE_BYTES = 256 * MIB  # at most
LEAST_HANDLES = 64  # of a whole range: what a shrink can give back is no less than a handle, so small caches have small ones


class VirtualMemory(Protocol):
    """What an arena needs of a driver; see platforms.cuda_driver, hip_driver and level_zero."""

    def reserve(self, num_bytes: int) -> int: ...
    def free_range(self, address: int, num_bytes: int) -> None: ...
    def create(self, num_bytes: int) -> Any: ...
    def release(self, handle: Any) -> None: ...
    def map(self, address: int, num_bytes: int, handle: Any) -> None: ...
    def unmap(self, address: int, num_bytes: int) -> None: ...
    def synchronize(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Handle:
    start_bytes: int
    num_bytes: int
    memory: Any

    @property
    def end_bytes(self) -> int:
        return self.start_bytes + self.num_bytes


class VirtualArena(Arena):
    """Exact to the granularity when it grows; while content matters it shrinks to the end of the last block's handle."""

    def __init__(
        self,
        block_bytes: int,
        max_blocks: int,
        *,
        driver: VirtualMemory,
        granularity_bytes: int,
        account: Account = no_account,
    ) -> None:
        super().__init__(block_bytes, max_blocks, granularity_bytes, account)
        share_bytes = round_up(self.reserved_bytes // LEAST_HANDLES, granularity_bytes)
        self.handle_bytes = min(HANDLE_BYTES, max(granularity_bytes, share_bytes))
        self._driver = driver
        self._handles: list[_Handle] = []
        self._address = driver.reserve(self.reserved_bytes)

    @property
    def address(self) -> int:
        """First byte of the range."""
        return self._address

    @property
    def committed_bytes(self) -> int:
        """Bytes of all mapped handles."""
        return self._handles[-1].end_bytes if self._handles else 0

    @property
    def committed_blocks(self) -> int:
        """Whole blocks that the mapped handles hold, as far as the range reaches."""
        return min(self.max_blocks, self.committed_bytes // self.block_bytes)

    def resize(self, num_blocks: int, *, keep_content: bool = True) -> None:
        """Back the first num_blocks blocks. Without keep_content nothing beyond them is backed, and content may be lost.

        The driver rounds to its granularity, so a few blocks more may be backed than were asked for; committed_blocks counts
        them. Raises OutOfDeviceMemory; what was backed before stays, but for a handle that an exact shrink gave up first.
        """
        assert not self.closed, "a closed arena cannot be resized"
        assert 0 <= num_blocks <= self.max_blocks, f"{num_blocks} of {self.max_blocks} blocks"
        wanted_bytes = self.bytes_for(num_blocks)
        if wanted_bytes < self.committed_bytes:
            self._shrink(wanted_bytes, keep_content=keep_content)
        if wanted_bytes > self.committed_bytes:
            more_bytes = wanted_bytes - self.committed_bytes
            self._account(more_bytes)
            try:
                self._back(self.committed_bytes, wanted_bytes)
            except BaseException:
                self._account(self.committed_bytes - wanted_bytes)
                raise

    def _shrink(self, wanted_bytes: int, *, keep_content: bool) -> None:
        """Unmap handles from the end; the one that straddles wanted_bytes goes only where content does not matter."""
        before_bytes = self.committed_bytes
        if keep_content and self._handles[-1].start_bytes < wanted_bytes:
            return
        self._driver.synchronize()
        try:
            while self._handles and self._handles[-1].end_bytes > wanted_bytes:
                if keep_content and self._handles[-1].start_bytes < wanted_bytes:
                    break
                self._drop(self._handles[-1])
        finally:
            self._account(self.committed_bytes - before_bytes)

    def _drop(self, handle: _Handle) -> None:
        self._driver.unmap(self._address + handle.start_bytes, handle.num_bytes)
        self._handles.remove(handle)  # only now: where the driver refuses, the bytes are still ours
        self._driver.release(handle.memory)

    def _back(self, start_bytes: int, end_bytes: int) -> None:
        kept = len(self._handles)
        try:
            while start_bytes < end_bytes:
                num_bytes = min(self.handle_bytes, end_bytes - start_bytes)
                memory = self._driver.create(num_bytes)
                try:
                    self._driver.map(self._address + start_bytes, num_bytes, memory)
                except BaseException:
                    self._driver.release(memory)
                    raise
                self._handles.append(_Handle(start_bytes, num_bytes, memory))
                start_bytes += num_bytes
        except BaseException:
            while len(self._handles) > kept:
                self._drop(self._handles[-1])
            raise

    def _unback(self, start_bytes: int, end_bytes: int) -> None:
        raise AssertionError("handles are dropped by resize")

    def _release(self) -> None:
        steps: list[Callable[[], None]] = [self._driver.synchronize]
        steps += [partial(self._drop, handle) for handle in reversed(self._handles)]
        steps.append(partial(self._driver.free_range, self._address, self.reserved_bytes))
        failures: list[BrimError] = []
        for step in steps:
            try:
                step()
            except BrimError as error:  # a device that refuses one call may still take the rest back
                failures.append(error)
        if failures:
            raise failures[0]

    def __del__(self) -> None:
        if hasattr(self, "_address"):
            with contextlib.suppress(Exception):
                self.close()
