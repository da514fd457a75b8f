"""The driver begins while torch is still being imported. Owns the thread; no context is made, no device memory is taken.

On a machine with an H100 initialising the driver took 0.4 s of a start that imports 4.3 s (docs/log.md). Only for a process of
our own: what a caller sets in the environment later would come too late.
"""

from __future__ import annotations

import ctypes
import threading
from contextlib import suppress


def begin() -> None:
    """Initialise CUDA's driver where it is there, in a thread. Nothing is raised: who needs it finds out why it is missing."""
    threading.Thread(target=_initialise, daemon=True).start()


def _initialise() -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuInit(0)
