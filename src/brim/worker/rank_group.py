"""The workers of several ranks as one executor. Owns that they stay equal: same steps, same number of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from brim.engine.step import BlockCopy, Executor, StepPlan, StepResult
from brim.errors import OutOfDeviceMemory
from brim.worker.device_worker import DeviceWorker


class RankGroup(Executor):
    """Workers in the order of their ranks, all in this process; the first one's results are the group's."""

    def __init__(self, workers: Sequence[DeviceWorker]) -> None:
        self._workers = tuple(workers)

    @property
    def committed_blocks(self) -> tuple[int, ...]:
        """Blocks backed by memory on every rank."""
        return tuple(min(column) for column in zip(*(worker.committed_blocks for worker in self._workers), strict=True))

    def execute(self, plan: StepPlan) -> StepResult:
        """On every rank. A rank that is out of memory leaves a step that the others did: it is repeated on all."""
        results = [worker.execute(plan) for worker in self._workers]
        return results[0]

    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        """On every rank."""
        moves = list(copies)
        for worker in self._workers:
            worker.copy_blocks(moves)

    def set_committed_blocks(self, blocks: tuple[int, ...]) -> tuple[int, ...]:
        """As many on every rank, or the least that one has. Raises OutOfDeviceMemory with all ranks as they were."""
        before = self.committed_blocks
        try:
            for worker in self._workers:
                worker.set_committed_blocks(blocks)
        except OutOfDeviceMemory:
            for worker in self._workers:
                worker.set_committed_blocks(before)
            raise
        return self.committed_blocks

    @property
    def gives_back(self) -> bool:
        """Where every rank's does."""
        return all(worker.gives_back for worker in self._workers)

    def pressure_bytes(self) -> int:
        """Of the rank whose device is the tightest."""
        return max(worker.pressure_bytes() for worker in self._workers)

    def memory_report(self) -> dict[str, Any]:
        """The first rank's, with those of all under "ranks"."""
        reports = [worker.memory_report() for worker in self._workers]
        return {**reports[0], "ranks": reports}

    def close(self) -> None:
        """On every rank."""
        for worker in self._workers:
            worker.close()
