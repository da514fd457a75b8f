"""The arena contract: one reserved address range of which exactly a prefix of blocks is backed by memory. Torch-free.

Addresses never change between construction and close, so views and captured graphs over the range stay valid while the
cache grows and shrinks. Content of blocks that stay committed survives; blocks committed again read as zero or as old
content, so nobody may rely on it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from brim.errors import OutOfDeviceMemory
from brim.units import round_up

# Called with +bytes before memory is taken (raises OutOfDeviceMemory to refuse) and with -bytes after it was given back.
Account = Callable[[int], None]


def no_account(delta_bytes: int) -> None:
    """For arenas nobody keeps an account of (tests)."""


class Arena(ABC):
    """max_blocks blocks of block_bytes. `resize(n)` backs exactly the first n; bytes are rounded up to the granularity."""

    def __init__(self, block_bytes: int, max_blocks: int, granularity_bytes: int, account: Account = no_account) -> None:
        assert block_bytes > 0 and max_blocks > 0, "an arena needs blocks"
        self.block_bytes = block_bytes
        self.max_blocks = max_blocks
        self.granularity_bytes = granularity_bytes
        self._account = account
        self._committed_blocks = 0
        self._closed = False

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the address range."""
        return round_up(self.max_blocks * self.block_bytes, self.granularity_bytes)

    @property
    def committed_blocks(self) -> int:
        """Blocks that may be touched."""
        return self._committed_blocks

    @property
    def committed_bytes(self) -> int:
        """Bytes backed by memory, rounding included; what the account was told."""
        return self.bytes_for(self._committed_blocks)

    def bytes_for(self, num_blocks: int) -> int:
        """Bytes that num_blocks committed blocks take."""
        return round_up(num_blocks * self.block_bytes, self.granularity_bytes)

    @property
    @abstractmethod
    def address(self) -> int:
        """First byte of the range; fixed until close."""

    @property
    def growable(self) -> bool:
        """False where everything is committed from the start and stays so."""
        return True

    @property
    def closed(self) -> bool:
        """The range is gone."""
        return self._closed

    def commit(self, num_blocks: int) -> None:
        """Grow to at least num_blocks. Raises OutOfDeviceMemory and changes nothing where memory is not there."""
        if num_blocks > self.committed_blocks:
            self.resize(num_blocks)

    def uncommit(self, num_blocks: int) -> None:
        """Shrink to at most num_blocks."""
        if num_blocks < self.committed_blocks:
            self.resize(num_blocks)

    def resize(self, num_blocks: int, *, keep_content: bool = True) -> None:
        """Back the first num_blocks blocks. Raises OutOfDeviceMemory and keeps the old size where it cannot grow.

        Where memory comes in large units a smaller size may keep more than was asked for, so that no content is lost;
        committed_blocks says what. With keep_content False the size is exact and content may be lost.
        """
        assert not self._closed, "a closed arena cannot be resized"
        assert 0 <= num_blocks <= self.max_blocks, f"{num_blocks} of {self.max_blocks} blocks"
        old_bytes, new_bytes = self.committed_bytes, self.bytes_for(num_blocks)
        if new_bytes > old_bytes:
            self._account(new_bytes - old_bytes)
            try:
                self._back(old_bytes, new_bytes)
            except OutOfDeviceMemory:
                self._account(old_bytes - new_bytes)
                raise
        elif new_bytes < old_bytes:
            self._unback(new_bytes, old_bytes)
            self._account(new_bytes - old_bytes)
        self._committed_blocks = num_blocks

    def close(self) -> None:
        """Give memory and addresses back. Safe to call twice; views of the range must not be used afterwards."""
        if self._closed:
            return
        held_bytes = self.committed_bytes
        self._closed = True
        self._committed_blocks = 0
        try:
            self._release()
        finally:
            if held_bytes:
                self._account(-held_bytes)

    @abstractmethod
    def _back(self, start_bytes: int, end_bytes: int) -> None:
        """Back [start, end) of the range with memory, all of it or none (OutOfDeviceMemory)."""

    @abstractmethod
    def _unback(self, start_bytes: int, end_bytes: int) -> None:
        """Give the memory of [start, end) back, keep the addresses."""

    @abstractmethod
    def _release(self) -> None:
        """Give the whole range back."""
