"""The driver begins while torch is still being imported. Owns the thread; no context is made, no device memory is taken.

On a machine with an H100 initialising the driver took 0.4 s of a start that imports 4.3 s (docs/log.md). Only for a process of
our own: what a caller sets in the environment later would come too late.
"""

from __future__ import annotations

import ctypes
import threading

_LIBRARIES = {"libcuda.so.1": "cuInit"}  # others initialise in a context's first call; hipInit was never tried


def begin() -> None:
    """Initialise every driver that is there, in a thread. Nothing is raised: who needs the driver finds out why it is missing."""
    threading.Thread(target=_initialise, daemon=True).start()


def _initialise() -> None:
    for library, function in _LIBRARIES.items():
        try:
            getattr(ctypes.CDLL(library), function)(0)
        except (OSError, AttributeError):
            continue
