"""An engine process from the moment it is started: it imports what an engine needs while nobody has told it yet what to serve.

Owns the process, its stdin and the pipe of its phases. Imports next to nothing itself, so that it can come first of all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType

from brim.errors import EngineError

ENGINE_COMMAND = (sys.executable, "-m", "brim.engine_main")
_STDERR = 2


class LaunchedProcess:
    """A process in a session and group of its own; its output goes to stderr. As a context manager it ends with the context,
    taken over or not.

    progress_fd: reading end of a pipe, not blocking; writing_fd: the child's end, under the same number there.
    """

    def __init__(self, command: Sequence[str] = ENGINE_COMMAND) -> None:
        """Raises EngineError where it cannot be started."""
        self.progress_fd, self.writing_fd = os.pipe()
        os.set_blocking(self.progress_fd, False)
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=_STDERR, start_new_session=True, pass_fds=(self.writing_fd,)
            )
        except OSError as error:
            os.close(self.progress_fd)
            raise EngineError(f"The engine process could not be started: {error}.") from error
        finally:
            os.close(self.writing_fd)

    def tell(self, line: bytes) -> None:
        """The one line it waits for. Blocks while it cannot take it; one that has ended is not told."""
        assert self.process.stdin is not None, "its stdin is a pipe"
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line)
            self.process.stdin.flush()

    def kill(self) -> None:
        """End it now, and whatever it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session, so its own group

    def close(self) -> None:
        """End it and close its pipes; once, for its number may be another's then."""
        if self.progress_fd < 0:
            return
        self.kill()
        self.process.wait()
        assert self.process.stdin is not None, "its stdin is a pipe"
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        os.close(self.progress_fd)
        self.progress_fd = -1

    def __enter__(self) -> LaunchedProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
