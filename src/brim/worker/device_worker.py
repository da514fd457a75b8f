"""The engine's executor on one device: a proven worker that runs steps, resizes its cache and accounts for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from brim.engine.step import BlockCopy, Executor, StepPlan, StepResult
from brim.errors import BrimError
from brim.memory.ledger import Ledger
from brim.memory.profiling import PhaseRecord
from brim.memory.report import format_start, report_json
from brim.platforms.base import Platform
from brim.worker.phases import ReadyWorker


@contextmanager
def foreign_errors(platform: Platform) -> Iterator[None]:
    """Errors of the device's libraries become ours: OutOfDeviceMemory, DeviceLost. Others pass as they are."""
    try:
        yield
    except BrimError:
        raise
    except Exception as error:
        known = platform.as_brim_error(error)
        if known is None:
            raise
        raise known from error


class DeviceWorker(Executor):
    """Owns a ReadyWorker for as long as it serves."""

    def __init__(self, ready: ReadyWorker, ledger: Ledger) -> None:
        warm = ready.warm
        opened = warm.reserved.loaded.opened
        self._ready: ReadyWorker | None = ready
        self._plan = ready.plan
        self.ledger = ledger
        self._reserve_bytes = ready.plan.budget.reserve_bytes
        self._platform = opened.platform
        self._profiler = opened.profiler
        self._kernels = opened.kernels
        self._cache = warm.reserved.cache
        self._runner = warm.runner

    @property
    def ready(self) -> ReadyWorker:
        """What start-up built; gone after close."""
        assert self._ready is not None, "the worker is closed"
        return self._ready

    @property
    def committed_blocks(self) -> tuple[int, ...]:
        """Blocks backed by memory in each KV group, block 0 included."""
        return self._cache.committed_blocks

    @property
    def num_programs(self) -> int:
        """Recorded decode programs."""
        return self._runner.num_programs

    @property
    def phase_records(self) -> list[PhaseRecord]:
        """The phases of the start, in order."""
        return self._profiler.records

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step to its end."""
        with foreign_errors(self._platform), self._platform.stream():
            return self._runner.execute(plan)

    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Queue one step; its result is waited for by the returned call."""
        with foreign_errors(self._platform), self._platform.stream():
            result = self._runner.submit(plan)

        def wait() -> StepResult:
            with foreign_errors(self._platform):
                return result()

        return wait

    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        """Copy KV blocks between steps."""
        with foreign_errors(self._platform), self._platform.stream():
            for copy in copies:
                self._cache.copy_block(copy.group, copy.source, copy.target)

    def set_committed_blocks(self, blocks: tuple[int, ...]) -> tuple[int, ...]:
        """Commit or uncommit; what is committed now."""
        with foreign_errors(self._platform), self._platform.stream():
            return self._cache.resize(blocks)

    @property
    def gives_back(self) -> bool:
        """Whether the arenas can grow and shrink."""
        return self._platform.capabilities.reserve_commit

    def pressure_bytes(self) -> int:
        """Bytes the device asks back now (negative: could be taken again)."""
        return self._platform.pressure_bytes(self._reserve_bytes)

    def memory_report(self) -> dict[str, Any]:
        """The account after prove with its phases, and what is held and free now."""
        report = report_json(self._plan, self.ledger, self._profiler.records)
        now = self._platform.reading()
        report["resident_bytes"], report["free_bytes"] = now.ours_bytes, now.free_bytes
        report["peak_bytes"] = self._platform.peak_ours_bytes()
        return report

    def startup_report(self) -> str:
        """Phases, ledger and KV size as plain text of 80 columns."""
        return format_start(self._plan, self.ledger, self._profiler.records)

    def close(self) -> None:
        """Give everything back: graphs, KV memory, threads, scratch, weights."""
        if self._ready is None:
            return
        self._platform.synchronize()
        self._runner.forget_programs()
        self._cache.close()
        self._kernels.close()
        self._ready.warm.reserved.loaded.model.close()
        self._ready = None
        del self._cache, self._runner, self._kernels
        if not self._platform.capabilities.host_memory:  # there it would also freeze what the caller still holds
            self._platform.release_unused()
