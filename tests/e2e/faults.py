"""Ways in which an engine process can go wrong, by name."""

from __future__ import annotations

import os
import signal
import time

from brim.errors import DeviceLost, OutOfDeviceMemory

DEATHS = ("abort", "kill", "exit", "hang", "lost")


def happen(how: str) -> None:
    """End this process, hang, or raise."""
    if how == "abort":
        os.abort()
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(9)
    if how == "hang":
        time.sleep(3600)
    if how == "lost":
        raise DeviceLost("The scripted device was lost.")
    if how == "oom":
        raise OutOfDeviceMemory("The scripted device is full.")
    raise RuntimeError(f"a scripted bug ({how})")
