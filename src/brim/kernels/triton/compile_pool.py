"""Processes that compile kernel variants while the engine starts. Owns starting, feeding and ending them.

They write into Triton's cache on disk, from which this process then only loads. Nothing here is needed: what they leave out,
or all of it where they cannot work, is compiled when it is first called.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from triton.backends.compiler import GPUTarget

from brim.kernels.rehearsal import CompileReport
from brim.kernels.triton.variant import Variant

MAX_PROCESSES = 8  # more take longer to start than they save: the slowest variant bounds the whole
_TELL_EVERY_S = 0.25
TIME_LIMIT_S = 120.0
_COMMAND = (sys.executable, "-m", "brim.kernels.triton.compile_process")


class CompilePool:
    """A `CompileJob`. Begins at once, in threads that mostly wait: nothing here holds up the caller.

    command: what starts a process; before: waited for before the cache is asked; num_processes: at most so many, None: as
    many as there are cores to run on.
    """

    def __init__(
        self,
        variants: Iterable[Variant],
        target: GPUTarget,
        num_processes: int | None = None,
        command: tuple[str, ...] = _COMMAND,
        time_limit_s: float = TIME_LIMIT_S,
        before: Callable[[], None] | None = None,
    ) -> None:
        self._before = before
        self._target = target
        self._variants = sorted(variants, key=lambda variant: (variant.cost_rank, variant.text))
        self._most = min(MAX_PROCESSES, num_processes or len(os.sched_getaffinity(0)))
        self._command = command
        self._deadline = time.monotonic() + time_limit_s
        self._started = time.monotonic()
        self._duration_s = 0.0
        self._lock = threading.Lock()
        self._is_closed = False
        self._missing: deque[Variant] = deque()
        self._num_cached = 0
        self._num_compiled = 0
        self._failures: list[str] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._thread = threading.Thread(target=self._run, name="compile-ahead", daemon=True)
        self._thread.start()

    def wait(self, told: Callable[[int, int], None] | None = None) -> CompileReport:
        """See `CompileJob`; at most until the time limit."""
        while self._thread.is_alive() and (left_s := self._deadline - time.monotonic()) > 0:
            if told is not None:
                told(self._num_cached + self._num_compiled, len(self._variants))
            self._thread.join(min(left_s, _TELL_EVERY_S))
        if self._thread.is_alive():
            self._failures.append("the time limit was reached")
        self.close()
        duration_s = self._duration_s or time.monotonic() - self._started
        return CompileReport(len(self._variants), self._num_cached, self._num_compiled, duration_s, tuple(self._failures))

    def close(self) -> None:
        """See `CompileJob`."""
        with self._lock:
            self._is_closed = True
            for process in self._processes:
                process.kill()
        self._thread.join()

    def _run(self) -> None:
        if self._before is not None:
            self._before()
        self._missing.extend(variant for variant in self._variants if not self._is_cached(variant))
        self._num_cached = len(self._variants) - len(self._missing)
        feeders = [threading.Thread(target=self._feed, daemon=True) for _ in range(min(self._most, len(self._missing)))]
        for feeder in feeders:
            feeder.start()
        for feeder in feeders:
            feeder.join()
        self._duration_s = time.monotonic() - self._started

    def _is_cached(self, variant: Variant) -> bool:
        try:
            return variant.is_cached(self._target)
        except Exception as error:  # a cache that cannot be read, a variant that Triton refuses: who compiles will say
            self._note(variant, repr(error))
            return False

    def _feed(self) -> None:
        """One process from its start to its end."""
        process = self._start()
        if process is None:
            return
        try:
            with process:
                try:
                    self._converse(process)
                finally:
                    process.kill()
        except OSError as error:  # it ended before it was told anything
            self._note(None, str(error))

    def _converse(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None
        print(json.dumps([self._target.backend, self._target.arch, self._target.warp_size]), file=process.stdin)
        while (variant := self._next()) is not None:
            print(json.dumps(variant.text), file=process.stdin, flush=True)
            answer = process.stdout.readline()
            if not answer:
                self._note(variant, "the process that compiled it ended")
                return
            self._note(variant, answer.strip())

    def _start(self) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._is_closed:
                return None
            try:
                process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    encoding="utf-8",
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},  # no context, whatever a library does when it is loaded
                )
            except OSError as error:
                self._failures.append(str(error))
                return None
            self._processes.append(process)
            return process

    def _next(self) -> Variant | None:
        with self._lock:
            return self._missing.popleft() if self._missing and not self._is_closed else None

    def _note(self, variant: Variant | None, reason: str) -> None:
        """What became of a variant, or of a process."""
        with self._lock:
            if reason and not self._is_closed:
                self._failures.append(f"{variant.kernel}: {reason}" if variant else reason)
            self._num_compiled += not reason
