"""The bound native library and its thread pool. Owns ctypes: nothing else in Brim calls it for kernels."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

from brim.errors import BrimError

_POINTERS, _SIZES, _REALS = 10, 16, 4
OP_BYTES = 4 * 4 + _POINTERS * 8 + _SIZES * 8 + _REALS * 4


def op_format(pointers: int, sizes: int, reals: int = 0) -> struct.Struct:
    """Packs one operation descriptor (struct brim_op): code, dtype, out dtype, flags, then the fields used; the rest is zero."""
    return struct.Struct(
        f"=4i{pointers}Q{(_POINTERS - pointers) * 8}x{sizes}q{(_SIZES - sizes) * 8}x{reals}f{(_REALS - reals) * 4}x"
    )


class NativeLibrary:
    """The functions of one built library."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.open = library.brim_open
        self.open.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        self.open.restype = ctypes.c_void_p
        self.close = library.brim_close
        self.close.argtypes = [ctypes.c_void_p]
        self.close.restype = None
        self.run = library.brim_run
        self.run.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64]
        self.run.restype = ctypes.c_int
        for name in ("brim_scratch_bytes", "brim_shared_bytes"):
            getattr(library, name).argtypes = [ctypes.c_int64]
            getattr(library, name).restype = ctypes.c_int64
        library.brim_byte_products.restype = ctypes.c_char_p
        self.byte_products: str = library.brim_byte_products().decode()
        self.scratch_bytes = library.brim_scratch_bytes
        self.shared_bytes = library.brim_shared_bytes
        library.brim_op_bytes.restype = ctypes.c_int64
        if library.brim_op_bytes() != OP_BYTES:
            raise BrimError(f"native kernels at {path} have another operation layout; remove the file")


class ThreadPool:
    """The native threads and their scratch memory. Idle threads sleep; `close` ends them."""

    def __init__(self, library: NativeLibrary, num_threads: int, max_head_dim: int) -> None:
        per_thread, shared = library.scratch_bytes(max_head_dim), library.shared_bytes(max_head_dim)
        self.num_threads = num_threads
        self.scratch_bytes: int = num_threads * per_thread + shared
        self._library = library
        self._run = library.run
        self._handle: int | None = library.open(num_threads, per_thread, shared)
        if self._handle is None:
            raise BrimError(f"cannot start {num_threads} kernel threads")

    def run(self, ops: bytes, count: int) -> None:
        """Run packed operations one after the other, each on all threads."""
        if self._handle is None:
            raise BrimError("kernel threads are closed")
        if self._run(self._handle, ops, count) != 0:
            raise AssertionError("unknown operation code")

    def close(self) -> None:
        """End the threads; nothing runs afterwards."""
        if self._handle is not None:
            self._library.close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()
