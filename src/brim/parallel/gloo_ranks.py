"""Ranks that are processes, over torch's gloo on the host. Owns the group, and the store in which a rank says why it left.

A group of its own, not torch's default one: nothing global is set. Each rank sends its word to each other one, so that a broken
connection says whose it is. The store is kept by whoever launches the ranks, so reasons outlive the rank that gave them.
Source: torch.distributed, "Distributed Key-Value Store" and the gloo backend.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch.distributed import ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from brim.errors import EngineError, RankFailed, first_line
from brim.parallel.ranks import Ranks, said, silent

_WORD_BYTES = 1024
_LENGTH_BYTES = 2
_GRACE_S = 2.0  # a rank whose time ran out loses its connections a moment before its reason lies in the store
_FAILED = "failed"


class RankStore:
    """Where ranks find each other and leave their reasons. The launcher keeps it until all ranks have ended."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        """Raises EngineError where this host cannot listen there."""
        try:
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        except RuntimeError as error:
            raise EngineError(f"No port is free on {host}: {first_line(error)}") from error
        self.host, self.port = host, int(self._store.port)


class GlooRanks(Ranks):
    """This process as rank `index` of `size`, which meet at a RankStore's (host, port).

    meet_s: how long the ranks may take to come together. timeout_s: how long a peer may take to come to an exchange; as long as
    the longest phase may be silent, for a peer that compiles is late and not gone. A peer that died is noticed at once.
    Raises RankFailed, naming who is missing, where not all come together.
    """

    def __init__(
        self, index: int, size: int, *, host: str = "127.0.0.1", port: int, meet_s: float = 120.0, timeout_s: float = 1800.0
    ) -> None:
        self.index, self.size = index, size
        self._where, self._timeout_s = f"{host}:{port}", timeout_s
        self._num_exchanges, self._has_left = 0, False
        self._peers = [peer for peer in range(size) if peer != index]
        patience = timedelta(seconds=meet_s)
        try:
            self._store = TCPStore(host, port, is_master=False, timeout=patience, wait_for_workers=False)
            self._store.set(_place(index), "0")
        except RuntimeError as error:
            raise RankFailed(self._no_store()) from error
        try:
            self._store.wait([_place(peer) for peer in self._peers], patience)
            self._group: Any = ProcessGroupGloo(self._store, index, size, timeout=patience)
        except RuntimeError as error:
            missing = [peer for peer in self._peers if not self._has(_place(peer))]
            why = silent(missing, meet_s) if missing else first_line(error)
            raise RankFailed(f"{size} ranks did not come together at {self._where}. {why}") from error

    def _exchange(self, word: bytes) -> list[bytes]:
        self.heed()
        self._num_exchanges += 1
        deadline_s = time.monotonic() + self._timeout_s
        with self._reading():
            self._store.set(_place(self.index), str(self._num_exchanges))
        mine = _framed(word)
        inboxes = [torch.empty_like(mine) for _ in range(self.size)]
        works = []
        for peer in self._peers:
            with self._blaming(peer, deadline_s):
                works.append((peer, self._group.recv([inboxes[peer]], peer, 0), self._group.send([mine], peer, 0)))
        for peer, received, sent in works:
            with self._blaming(peer, deadline_s):
                for work in (received, sent):
                    work.wait(timedelta(seconds=max(0.001, deadline_s - time.monotonic())))
        inboxes[self.index] = mine
        return [_unframed(inbox) for inbox in inboxes]

    def heed(self) -> None:
        """See Ranks. Costs one look into the store."""
        if self._has_left:
            raise EngineError(f"Rank {self.index} has left: it cannot agree on anything any more.")
        if self._has(_FAILED):
            self._end(self._reasons())

    @contextlib.contextmanager
    def _blaming(self, peer: int, deadline_s: float) -> Iterator[None]:
        """A broken connection is this peer's; where time ran out, it is all who have not come."""
        try:
            yield
        except RuntimeError as error:
            if time.monotonic() >= deadline_s - 0.001:
                self._end(self._reasons() or silent(self._late() or [peer], self._timeout_s), error)
            with contextlib.suppress(RuntimeError):
                self._store.wait([_FAILED], timedelta(seconds=_GRACE_S))
            self._end(self._reasons() or silent([peer]), error)

    def _late(self) -> list[int]:
        with self._reading():
            return [peer for peer in self._peers if int(self._store.get(_place(peer))) < self._num_exchanges]

    def _end(self, why: str, error: RuntimeError | None = None) -> NoReturn:
        self._leave(why)
        raise RankFailed(why) from error

    def _reasons(self) -> str:
        keys = [_reason(index) for index in range(self.size)]
        with self._reading():
            return said(self._store.get(key).decode() for key in keys if self._store.check([key]))

    def _has(self, key: str) -> bool:
        with self._reading():
            return bool(self._store.check([key]))

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankFailed(self._no_store()) from error

    def _no_store(self) -> str:
        return f"Nothing answers at {self._where}, where the ranks meet: whoever launched them is gone."

    def _leave(self, why: str) -> None:
        if self._has_left:
            return
        self._has_left = True
        if why:
            with contextlib.suppress(RuntimeError):
                self._store.set(_reason(self.index), why)
                self._store.set(_FAILED, "")
        del self._group  # peers that wait for this rank see their connection break, and read why


def _framed(word: bytes) -> torch.Tensor:
    """[_WORD_BYTES] uint8: length, word, zeros; all words are of one size, so that nobody must ask for it."""
    assert len(word) <= _WORD_BYTES - _LENGTH_BYTES, "a few figures and what they are about"
    framed = len(word).to_bytes(_LENGTH_BYTES, "little") + word
    return torch.frombuffer(bytearray(framed.ljust(_WORD_BYTES, b"\0")), dtype=torch.uint8)


def _unframed(tensor: torch.Tensor) -> bytes:
    framed = bytes(tensor.tolist())
    return framed[_LENGTH_BYTES : _LENGTH_BYTES + int.from_bytes(framed[:_LENGTH_BYTES], "little")]


def _place(index: int) -> str:
    return f"exchanges of rank {index}"


def _reason(index: int) -> str:
    return f"reason of rank {index}"
