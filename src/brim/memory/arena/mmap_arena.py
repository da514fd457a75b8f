"""The arena of host memory: pages of an anonymous mapping, backed and given back by the kernel. Torch-free.

Reserve is a mapping without permissions; commit makes pages writable and faults all of them in at once, so that memory
that is not there shows now and not in a step; uncommit maps fresh, empty addresses over them, which also returns what
strict overcommit accounting charged.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import sys

from brim.errors import OutOfDeviceMemory
from brim.memory.arena.base import Account, Arena, no_account
from brim.units import format_bytes, round_up

_PROT_NONE = 0
_PROT_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0x40
_RESERVE_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_MADV_HUGEPAGE = 14
_MADV_NOHUGEPAGE = 15
_MADV_POPULATE_WRITE = 23  # Linux 5.14
HUGE_PAGE_BYTES = 2 << 20


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


class MmapArena(Arena):
    """Exact to the page: what is committed is resident, what is not committed is not.

    huge_pages: back with 2 MiB pages where the kernel has them; granularity_bytes must then be a multiple of 2 MiB, so
    that a huge page never holds more than what is accounted. Without it the kernel is told not to use them.
    """

    def __init__(
        self,
        block_bytes: int,
        max_blocks: int,
        *,
        granularity_bytes: int = mmap.PAGESIZE,
        account: Account = no_account,
        huge_pages: bool = False,
    ) -> None:
        assert granularity_bytes % mmap.PAGESIZE == 0, "memory comes in whole pages"
        assert not huge_pages or granularity_bytes % HUGE_PAGE_BYTES == 0, "a huge page must be accounted whole"
        super().__init__(block_bytes, max_blocks, granularity_bytes, account)
        self._libc = _libc()
        self._huge_pages = huge_pages
        self._mapping_bytes = self.reserved_bytes + (HUGE_PAGE_BYTES if huge_pages else 0)
        self._mapping = self._map(None, self._mapping_bytes, 0)
        self._address = round_up(self._mapping, HUGE_PAGE_BYTES) if huge_pages else self._mapping

    @property
    def address(self) -> int:
        """First byte of the range."""
        return self._address

    def _map(self, address: int | None, num_bytes: int, extra_flags: int) -> int:
        """Addresses without memory; the kernel's refusal becomes OutOfDeviceMemory."""
        got = self._libc.mmap(address, num_bytes, _PROT_NONE, _RESERVE_FLAGS | extra_flags, -1, 0)
        if got is None or got == ctypes.c_void_p(-1).value:
            code = ctypes.get_errno()
            raise OutOfDeviceMemory(
                f"An address range of {format_bytes(num_bytes)} cannot be reserved ({os.strerror(code)}); "
                "raise the process's address space limit (ulimit -v) or lower --memory."
            )
        return int(got)

    def _back(self, start_bytes: int, end_bytes: int) -> None:
        address, num_bytes = self._address + start_bytes, end_bytes - start_bytes
        code = self._populate(address, num_bytes)
        if code:
            self._map(address, num_bytes, _MAP_FIXED)
            raise OutOfDeviceMemory(
                f"{format_bytes(num_bytes)} of KV cache cannot be backed by memory ({os.strerror(code)}); "
                "lower --memory, --max-num-seqs or --max-model-len."
            )

    def _populate(self, address: int, num_bytes: int) -> int:
        """Make [address, +num_bytes) writable and resident; 0, or the errno of the refusal."""
        if self._libc.mprotect(address, num_bytes, _PROT_READ_WRITE):
            return ctypes.get_errno()
        if sys.platform == "linux":  # advice: a kernel without huge pages answers EINVAL, and that is fine
            self._libc.madvise(address, num_bytes, _MADV_HUGEPAGE if self._huge_pages else _MADV_NOHUGEPAGE)
            while True:
                if not self._libc.madvise(address, num_bytes, _MADV_POPULATE_WRITE):
                    return 0
                code = ctypes.get_errno()
                if code == errno.EINVAL:  # an older kernel
                    break
                if code not in (errno.EAGAIN, errno.EINTR):
                    return code
        for offset in range(0, num_bytes, mmap.PAGESIZE):
            ctypes.c_ubyte.from_address(address + offset).value = 0
        return 0

    def _unback(self, start_bytes: int, end_bytes: int) -> None:
        self._map(self._address + start_bytes, end_bytes - start_bytes, _MAP_FIXED)

    def _release(self) -> None:
        self._libc.munmap(self._mapping, self._mapping_bytes)

    def __del__(self) -> None:
        if hasattr(self, "_address"):
            with contextlib.suppress(Exception):
                self.close()
