"""Where Brim keeps files it can make again. Owns the choice of folder only."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$BRIM_CACHE_DIR, or $XDG_CACHE_HOME/brim, or ~/.cache/brim. Not created here."""
    own = os.environ.get("BRIM_CACHE_DIR")
    return Path(own).expanduser() if own else users_cache_folder()


def users_cache_folder() -> Path:
    """$XDG_CACHE_HOME/brim, or ~/.cache/brim. Not created here."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "brim"
