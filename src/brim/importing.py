"""How large libraries are imported, and what goes on beside that. Owns the garbage collector's rest meanwhile; imports nothing
large itself."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from brim.platforms import early_driver


@contextmanager
def collector_at_rest(*, for_good: bool = False) -> Iterator[None]:
    """No garbage collection inside: imports make hundreds of thousands of objects that stay, and going through them again and
    again is a fifth of the time that importing torch takes. They leave as old objects, which only full collections look at.

    for_good: no collection looks at them any more, nor at what was there before; only for a process of our own, since a cycle
    among them would never be given back."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if for_good:
            gc.freeze()
        elif gc.get_count()[0] > gc.get_threshold()[0]:  # much is new, and the next collection would go through all of it
            gc.freeze()
            gc.unfreeze()
        if was_enabled:
            gc.enable()


def begin_driver() -> None:
    """Let the device's driver initialise beside the imports, in a process of our own that will use it."""
    early_driver.begin()
