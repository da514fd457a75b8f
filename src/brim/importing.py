"""How large libraries are imported, and what goes on beside that. Owns the garbage collector's rest meanwhile; imports nothing
large itself."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from brim.platforms import early_driver


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """No garbage collection inside: imports make hundreds of thousands of objects that stay, and going through them again and
    again is a fifth of the time that importing torch takes."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def begin_driver() -> None:
    """Let the device's driver initialise beside the imports, in a process of our own that will use it."""
    early_driver.begin()
