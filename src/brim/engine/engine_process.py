"""The engine's own process: the loop between the socket and the engine core, and what starts and ends it.

Owns the child's life: it reads its launch from stdin, serves until told to stop, and never outlives its parent. How the core is
built is given (`brim.engine_main` gives the real one).

    idle                  blocked on the socket; once a second it follows what its neighbours on the device need or leave
    work                  messages that have arrived, then one step, then one StepOutputs
    a BrimError           EngineFailed, exit 1; nothing is closed: what failed may hang in it, and the system takes all back
    the parent is gone    exit at once: stdin ends, and the kernel kills where it can
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import IO, Any

import msgspec

from brim.config.schema import BrimConfig
from brim.engine.core import EngineCore
from brim.engine.messages import (
    AbortRequest,
    AddRequest,
    ControlCall,
    ControlReply,
    EngineFailed,
    EngineReady,
    StartupProgress,
    StepOutputs,
    ToEngine,
)
from brim.engine.transport import EngineChannel, ZmqEngineChannel
from brim.errors import BrimError, MemoryBudgetError, OutOfDeviceMemory

BuildCore = Callable[[BrimConfig, Callable[[StartupProgress], None]], tuple[EngineCore, dict[str, Any]]]
_PR_SET_PDEATHSIG = 1
_IDLE_CHECK_S = 1.0


class EngineLaunch(msgspec.Struct, frozen=True):
    """What the child reads as the first line of its stdin: JSON. progress_fd: a pipe for its phases; -1: none."""

    address: str
    parent_pid: int
    config: BrimConfig
    server_key: str = ""
    progress_fd: int = -1


def run_engine_process(build: BuildCore) -> int:
    """The child's main: read the launch, build, serve. Returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the parent, which drains first
        signal.signal(number, signal.SIG_IGN)
    stdin = sys.stdin.buffer
    line = stdin.readline()
    if not line:  # launched ahead of a server that then did not start
        return 1
    launch = msgspec.json.decode(line, type=EngineLaunch)
    _end_with_parent(launch.parent_pid, stdin)
    channel = ZmqEngineChannel(launch.address, launch.server_key)
    try:
        core, info = build(launch.config, ProgressTeller(channel, launch.progress_fd))
        serve_engine(core, info, channel)
        core.close()
    except BrimError as error:
        channel.send(describe_failure(error))
        return 1
    except Exception as error:
        channel.send(EngineFailed("EngineError", f"internal error, a bug in Brim: {type(error).__name__}: {error}."))
        raise
    finally:
        channel.close()
    return 0


class ProgressTeller:
    """Tells the parent of a start: everything over the socket, which a death may cut short; each phase, before it begins, also
    over a pipe, which keeps it."""

    def __init__(self, channel: EngineChannel, progress_fd: int) -> None:
        self._channel = channel
        self._fd = progress_fd
        self._phase = ""
        if progress_fd >= 0:
            os.set_inheritable(progress_fd, False)

    def __call__(self, progress: StartupProgress) -> None:
        """Tell it."""
        if self._fd >= 0 and (progress.phase != self._phase or progress.uses is not None):
            self._phase = progress.phase
            os.write(self._fd, msgspec.json.encode(progress) + b"\n")
        self._channel.send(progress)


def describe_failure(error: BrimError) -> EngineFailed:
    """An error as it crosses to the parent, which raises it there (`supervisor.named_error`)."""
    kind = type(error).__name__
    if isinstance(error, (MemoryBudgetError, OutOfDeviceMemory)):
        return EngineFailed(kind, str(error.args[0]), error.nearest, error.ledger)
    return EngineFailed(kind, str(error))


def serve_engine(core: EngineCore, info: dict[str, Any], channel: EngineChannel) -> None:
    """Serve until a "shutdown" call. Raises what the core raises when it cannot go on (EngineError, DeviceLost)."""
    channel.send(EngineReady(info))
    while True:
        for message in channel.receive(wait_s=0.0 if core.has_work else _IDLE_CHECK_S):
            if not _handle(core, message, channel):
                return
        if core.has_work:
            outputs = core.step()
            if outputs:
                channel.send(StepOutputs(outputs))
        else:
            core.tend()


def _handle(core: EngineCore, message: ToEngine, channel: EngineChannel) -> bool:
    """False where it was the last message."""
    if isinstance(message, AddRequest):
        core.add(message)
    elif isinstance(message, AbortRequest):
        core.abort(message.request_id)
    else:
        channel.send(_reply(core, message))
        return message.name != "shutdown"
    return True


def _reply(core: EngineCore, call: ControlCall) -> ControlReply:
    if call.name == "memory":
        return ControlReply(call.call_id, core.memory())
    if call.name == "stats":
        return ControlReply(call.call_id, {**core.stats(), "kv": core.memory_stats()})
    if call.name == "drain":
        core.drain()
    elif call.name not in ("shutdown", "ping"):
        return ControlReply(call.call_id, {}, f"The engine knows no call '{call.name}'.")
    return ControlReply(call.call_id, {})


def _end_with_parent(parent_pid: int, stdin: IO[bytes]) -> None:
    """Exit when the parent does: it holds the other end of stdin. The kernel's signal covers a thread that never lets go."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)
    threading.Thread(target=_exit_at_end_of, args=(stdin,), name="brim-parent", daemon=True).start()


def _exit_at_end_of(stdin: IO[bytes]) -> None:
    os.read(stdin.fileno(), 1)
    os._exit(1)
