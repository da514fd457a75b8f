"""An engine process that is started before anybody knows what it is to serve."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from brim.engine.launched_process import LaunchedProcess
from brim.errors import EngineError


def test_one_that_is_told_nothing_ends_with_its_context() -> None:
    with LaunchedProcess((sys.executable, "-c", "import time; time.sleep(60)")) as launched:
        assert launched.process.poll() is None
    assert launched.process.returncode == -9


def test_its_pipe_stays_open_for_it_and_is_closed_once() -> None:
    code = "import os, sys; os.write(int(sys.stdin.readline()), b'open'); sys.stdin.read()"
    with LaunchedProcess((sys.executable, "-c", code)) as launched:
        launched.tell(b"%d\n" % launched.writing_fd)
        deadline, said = time.monotonic() + 20, b""
        while not said and time.monotonic() < deadline:
            try:
                said = os.read(launched.progress_fd, 16)
            except BlockingIOError:
                time.sleep(0.01)
        assert said == b"open"
        launched.close()
        launched.close()
    assert launched.progress_fd == -1


def test_one_that_has_ended_is_not_told() -> None:
    with LaunchedProcess((sys.executable, "-c", "")) as launched:
        launched.process.wait()
        launched.tell(b"x" * (1 << 20))


def test_what_cannot_be_started_is_an_engine_error_and_leaves_no_pipe() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(EngineError, match="could not be started"):
        LaunchedProcess(("/no/such/program",))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("module", ["brim.engine_main"])
def test_an_engine_whose_server_never_speaks_ends_quietly(module: str) -> None:
    with LaunchedProcess((sys.executable, "-m", module)) as launched:
        assert launched.process.stdin is not None
        launched.process.stdin.close()
        assert launched.process.wait(60) == 1
