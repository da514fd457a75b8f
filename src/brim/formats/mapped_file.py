"""A model file mapped read-only into memory. Owns the mapping, the views into it and giving their pages back.

Does not know what is inside: `gguf` and `safetensors_file` do.
"""

from __future__ import annotations

import contextlib
import mmap
import stat
from pathlib import Path

from brim.errors import BrokenModel, ModelNotFound


class MappedFile:
    """One file, mapped. Views stay valid until `close`; resident memory is what was touched and not yet released."""

    def __init__(self, path: Path) -> None:
        """Maps `path`. Raises ModelNotFound where there is no readable file, BrokenModel for an empty one."""
        self.path = path
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for a writer
                raise ModelNotFound(f"{path} is not a regular file; check the path.")
            with path.open("rb") as file:
                self.size_bytes = path.stat().st_size
                if self.size_bytes == 0:
                    raise BrokenModel(f"{path} is empty; download the model again.")
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise ModelNotFound(f"There is no file {path}; check the path.") from error
        except (OSError, ValueError) as error:
            raise ModelNotFound(f"{path} cannot be read ({error}); check that it is a file you may read.") from error
        self.size_bytes = len(self.data)

    def view(self, offset: int, num_bytes: int) -> memoryview:
        """The bytes [offset, offset + num_bytes), which the caller has checked to lie inside the file; no copy."""
        return memoryview(self.data)[offset : offset + num_bytes]

    def release(self, offset: int, num_bytes: int) -> None:
        """Drop the pages of that range from resident memory; reading them again reads the file again."""
        if num_bytes <= 0 or not hasattr(self.data, "madvise"):
            return
        start = offset - offset % mmap.PAGESIZE
        self.data.madvise(mmap.MADV_DONTNEED, start, offset + num_bytes - start)

    def close(self) -> None:
        """Unmap; where views are still held, the mapping goes with the last of them."""
        with contextlib.suppress(BufferError):
            self.data.close()
