"""Ranks that are processes, over torch's gloo on the host. Owns the group, its store, and who is missing when one is silent.

A group of its own, not torch's default one: nothing global is set. Words are gathered in two steps, lengths and then bytes.
Source: torch.distributed, "Distributed Key-Value Store" and the gloo backend.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import DistStoreError, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from brim.errors import EngineError, RankFailed
from brim.parallel.ranks import Ranks


class GlooRanks(Ranks):
    """This process as rank `index` of `size`; rank 0 listens on (host, port), the others connect.

    timeout_s: how long a peer may take to answer, at the first meeting too. Raises RankFailed where not all come together.
    """

    def __init__(self, index: int, size: int, *, host: str = "127.0.0.1", port: int, timeout_s: float = 60.0) -> None:
        self.index, self.size = index, size
        self._timeout_s = timeout_s
        self._num_exchanges = 0
        patience = timedelta(seconds=timeout_s)
        try:
            self._store = TCPStore(host, port, size, is_master=index == 0, timeout=patience, wait_for_workers=False)
            self._store.set(_place(index), "0")
            self._group: Any = ProcessGroupGloo(self._store, index, size, timeout=patience)
        except (RuntimeError, DistStoreError) as error:
            where = f"{host}:{port} within {timeout_s:g} s"
            raise RankFailed(f"{size} ranks did not come together at {where}: {_first_line(error)}") from error

    def _exchange(self, word: bytes) -> list[bytes]:
        self._num_exchanges += 1
        try:
            self._store.set(_place(self.index), str(self._num_exchanges))
            lengths = self._gather(torch.tensor([len(word)]))
            padded = bytearray(word.ljust(int(max(lengths)), b"\0"))
            words = self._gather(torch.frombuffer(padded, dtype=torch.uint8))
        except RuntimeError as error:
            raise RankFailed(self._who_is_missing()) from error
        return [bytes(one[: int(length)].tolist()) for one, length in zip(words, lengths, strict=True)]

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        self._group.allgather([found], [tensor]).wait()
        return found

    def _who_is_missing(self) -> str:
        """By the store, which says how far each rank came."""
        missing = []
        try:
            for index in range(self.size):
                if int(self._store.get(_place(index))) < self._num_exchanges:
                    missing.append(str(index))
        except (RuntimeError, DistStoreError):
            return f"Rank 0, which keeps the ranks' store, is gone; rank {self.index} cannot go on."
        who = f"Rank {', '.join(missing)}" if missing else "Another rank"
        return f"{who} is gone, or did not answer within {self._timeout_s:g} s; rank {self.index} cannot go on."

    def close(self) -> None:
        """See Ranks."""
        del self._group, self._store


def free_port() -> int:
    """A port that rank 0 can listen on. Raises EngineError where there is none."""
    try:
        return int(TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False).port)
    except RuntimeError as error:
        raise EngineError(f"No port is free on the loopback address: {_first_line(error)}") from error


def _place(index: int) -> str:
    return f"rank {index}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
