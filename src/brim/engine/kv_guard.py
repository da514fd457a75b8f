"""Keeps the KV cache within what the device can spare while serving. Owns shrinking, growing back, and when; not the steps.

    a step is out of memory          relieve(): give back 1/16 of the cache, twice as much each time it happens again
    the device asks for bytes back   adjust(), every `check_interval_steps`: give back that much
    the device has bytes to spare    adjust(): take back up to what was committed at the start

The cache never goes below what the longest unfinished sequence needs alone, so no request is lost to it; under pressure alone
never below what one request of full length needs, so none that comes later is. Where blocks cannot go back to the device
nothing is done. After a step was out of memory nothing is taken back for a while; the pause doubles each time it happens again.
"""

from __future__ import annotations

from brim.engine.scheduler import Scheduler
from brim.engine.step import Executor
from brim.errors import OutOfDeviceMemory

_FIRST_SHARE = 16
_LONGEST_PAUSE_CHECKS = 64


class KVGuard:
    """Between scheduler and executor; every call needs an empty pipeline."""

    def __init__(self, scheduler: Scheduler, executor: Executor, *, check_interval_steps: int = 64) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._layout = scheduler.blocks.layout
        self._interval_steps = check_interval_steps
        self._steps_to_check = check_interval_steps
        self._pause_checks = 0
        self._next_pause_checks = 1
        self._share = _FIRST_SHARE
        self.num_shrinks = 0
        self.num_grows = 0

    @property
    def is_due(self) -> bool:
        """True where `adjust` should be called before the next step is planned."""
        return self._steps_to_check <= 0

    def note_step(self) -> None:
        """A step went well."""
        self._steps_to_check -= 1
        self._share = _FIRST_SHARE

    def relieve(self) -> bool:
        """A step was out of memory: give blocks back. False where nothing more can be given."""
        committed_bytes = self._committed_bytes()
        wanted = max(self._executor.pressure_bytes(), committed_bytes // self._share)
        self._share = max(2, self._share // 2)
        self._pause_checks = self._next_pause_checks
        self._next_pause_checks = min(2 * self._next_pause_checks, _LONGEST_PAUSE_CHECKS)
        return self._give_back(wanted, self._scheduler.least_blocks())

    def adjust(self, *, in_flight: bool = False) -> None:
        """Follow the device's pressure, either way. in_flight: steps are; then only look, and stay due where blocks should change
        hands, for which the device must have ended them."""
        pressure_bytes = self._executor.pressure_bytes()
        if in_flight and self._would_act(pressure_bytes):
            return
        self._steps_to_check = self._interval_steps
        if pressure_bytes > 0:
            self._give_back(pressure_bytes, self._scheduler.least_blocks(self._scheduler.limits.max_model_len))
        elif self._pause_checks:
            self._pause_checks -= 1
        elif pressure_bytes < 0:
            self._grow(-pressure_bytes)

    def grow_now(self) -> bool:
        """Take back what the device can spare, pause or not: a sequence cannot go on without. True where blocks were gained."""
        pressure_bytes = self._executor.pressure_bytes()
        return pressure_bytes < 0 and self._grow(-pressure_bytes)

    def _would_act(self, pressure_bytes: int) -> bool:
        if pressure_bytes > 0:
            return self._executor.gives_back
        return pressure_bytes < 0 and not self._pause_checks and self._growth(-pressure_bytes) is not None

    def _committed_bytes(self) -> int:
        return self._layout.bytes_for(self._scheduler.blocks.num_blocks)

    def _give_back(self, num_bytes: int, floor: tuple[int, ...]) -> bool:
        """At least num_bytes, where blocks can be spared: memory goes back in the device's units, which may be far larger than a
        block. False where nothing went back."""
        if not self._executor.gives_back:
            return False
        before_bytes = self._committed_bytes()
        wanted_bytes, given_bytes = num_bytes, 0
        while True:
            self._shrink(wanted_bytes - given_bytes, floor)
            given_bytes = before_bytes - self._committed_bytes()
            if given_bytes >= num_bytes or wanted_bytes >= before_bytes:
                return given_bytes > 0
            wanted_bytes *= 2

    def _shrink(self, num_bytes: int, floor: tuple[int, ...]) -> None:
        """Each group gives its share of num_bytes, at least one block, down to its floor; live blocks move down or their
        sequences are preempted."""
        before = self._scheduler.blocks.num_blocks
        before_bytes = self._layout.bytes_for(before)
        left_bytes = max(0, before_bytes - num_bytes)
        wanted = (min(count - 1, count * left_bytes // before_bytes) for count in before)
        targets = tuple(min(b, max(2, w, f)) for b, w, f in zip(before, wanted, floor, strict=True))
        if targets == before:
            return
        copies = self._scheduler.resize(targets)
        self._executor.copy_blocks(copies)
        reached = self._scheduler.blocks.num_blocks
        committed = self._executor.set_committed_blocks(reached)
        assert all(c >= r for c, r in zip(committed, reached, strict=True)), "the executor dropped blocks that are in use"
        self._scheduler.resize(tuple(min(pair) for pair in zip(committed, before, strict=True)))  # it may keep more: larger units
        self.num_shrinks += 1

    def _grow(self, num_bytes: int) -> bool:
        """Take blocks back, of num_bytes at most. False where none were gained."""
        before, targets = self._scheduler.blocks.num_blocks, self._growth(num_bytes)
        if targets is None:
            return False
        try:
            committed = self._executor.set_committed_blocks(targets)
        except OutOfDeviceMemory:
            self._executor.set_committed_blocks(before)
            return False
        pools = self._scheduler.blocks.pools
        self._scheduler.resize(tuple(min(p.capacity, count) for p, count in zip(pools, committed, strict=True)))
        self.num_grows += 1
        return self._scheduler.blocks.num_blocks != before

    def _growth(self, num_bytes: int) -> tuple[int, ...] | None:
        """Blocks of each group when it takes its share of num_bytes, up to its capacity; None where that is no block more."""
        pools = self._scheduler.blocks.pools
        missing_bytes = self._layout.bytes_for(tuple(pool.capacity - pool.num_blocks for pool in pools))
        if not missing_bytes or not self._executor.gives_back:
            return None
        share_bytes = min(num_bytes, missing_bytes)
        targets = tuple(p.num_blocks + (p.capacity - p.num_blocks) * share_bytes // missing_bytes for p in pools)
        return None if targets == self._scheduler.blocks.num_blocks else targets
