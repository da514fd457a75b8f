"""A recorded list of kernel calls, run again by one native call. Owns the list and what keeps its buffers alive."""

from __future__ import annotations

from torch import Tensor

from brim.kernels.cpu.native import OP_BYTES, ThreadPool


class Program:
    """What `CpuKernels.record` yields: the CPU's counterpart of a device graph.

    Recording stores calls without running them. Shapes, strides and addresses are those of the recording; ids, positions, slots,
    block tables, lengths and sampling parameters are read from their tensors each time it runs.
    """

    def __init__(self, pool: ThreadPool) -> None:
        self._pool = pool
        self._parts: list[bytes] = []
        self._kept: list[Tensor | None] = []
        self._ops = b""

    def append(self, op: bytes, tensors: tuple[Tensor | None, ...]) -> None:
        """Store one packed call and the tensors it points into."""
        self._parts.append(op)
        self._kept.extend(tensors)

    def finish(self) -> None:
        """Called at the end of recording."""
        self._ops = b"".join(self._parts)
        self._parts = []

    def __len__(self) -> int:
        return len(self._ops) // OP_BYTES

    def replay(self) -> None:
        """Run all recorded calls. Allocates nothing."""
        self._pool.run(self._ops, len(self._ops) // OP_BYTES)
