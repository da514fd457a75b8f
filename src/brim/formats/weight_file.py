"""What a loader needs of a file of weights, whatever its format. Owns the contract only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


class TensorInfo(Protocol):
    """Where one tensor lies. `shape` is in torch order (slowest dimension first)."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


@runtime_checkable
class WeightSource(Protocol):
    """Named tensors in one or more mapped files.

    `info`, `tensor_bytes` and `release` raise BrokenModel for a name the files do not have. `tensor_bytes` is a view over the
    mapping, valid until `close`; `release` drops its pages, so a loader that releases each tensor holds one at a time.
    """

    def names(self) -> Sequence[str]: ...
    def info(self, name: str) -> TensorInfo: ...
    def tensor_bytes(self, name: str) -> memoryview: ...
    def release(self, name: str) -> None: ...
    def close(self) -> None: ...
