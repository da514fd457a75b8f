"""A model file mapped read-only into memory. Owns the mapping, the views into it and giving their pages back.

Does not know what is inside: `gguf` and `safetensors_file` do.
"""

from __future__ import annotations

import contextlib
import mmap
import stat
from pathlib import Path
from typing import Generic, TypeVar

from brim.errors import BrokenModel, ModelNotFound
from brim.formats.weight_file import TensorInfo

T = TypeVar("T", bound=TensorInfo)


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


class MappedTensors(Generic[T]):
    """Named tensors in one mapped file: a WeightSource, whatever the format. `advice`: what to do where one is missing."""

    advice = "download the model again"

    def __init__(self, mapped: MappedFile, tensors: dict[str, T]) -> None:
        self._mapped = mapped
        self.path = mapped.path
        self.tensors = tensors

    def names(self) -> list[str]:
        """Tensor names in file order."""
        return list(self.tensors)

    def info(self, name: str) -> T:
        """Raises BrokenModel for a name the file does not have."""
        try:
            return self.tensors[name]
        except KeyError:
            raise BrokenModel(f"{self.path} has no tensor '{name}'; {self.advice}.") from None

    def tensor_bytes(self, name: str) -> memoryview:
        """The bytes as they are stored, as a view over the mapping."""
        tensor = self.info(name)
        return self._mapped.view(tensor.offset, tensor.num_bytes)

    def release(self, name: str) -> None:
        """Drop the tensor's pages from resident memory."""
        tensor = self.info(name)
        self._mapped.release(tensor.offset, tensor.num_bytes)

    def close(self) -> None:
        """Unmap."""
        self._mapped.close()
