"""Where Triton keeps what it compiled. Owns the way out where that folder cannot be written: Triton cannot do without one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from triton import knobs

from brim.errors import DeviceError


def replace_unwritable_cache() -> tempfile.TemporaryDirectory[str] | None:
    """Point Triton, here and in processes started from here, to a new folder where its own cannot be written.

    Returns the new folder, gone when it is cleaned up or forgotten: every start then compiles anew. Raises DeviceError where no
    folder can be made.
    """
    folder = Path(knobs.cache.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        try:
            made = tempfile.TemporaryDirectory(prefix="brim-triton-")
        except OSError:
            reason = f"Triton can write neither its cache folder {folder} nor a temporary one; set TRITON_CACHE_DIR to one it can"
            raise DeviceError(reason) from error
        os.environ.update(TRITON_CACHE_DIR=made.name)
        return made
