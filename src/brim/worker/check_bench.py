"""What a conformance check stands on: the platform, the settings, memory taken and given back. Owns no check."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

from brim.config.schema import BrimConfig
from brim.kernels.select import KernelSelection, select_kernels
from brim.kernels.triton.scratch import KernelLimits
from brim.memory.arena.base import Arena
from brim.memory.arena.factory import new_arena
from brim.platforms.base import MemoryReading, Platform
from brim.units import MIB, format_bytes, round_up

Outcome = Literal["passed", "failed", "not_supported", "not_tried"]
Figures = dict[str, int | float | str]

HOST_PROBE_BYTES = 64 * MIB
DEVICE_PROBE_BYTES = 256 * MIB
LEAST_PROBE_BYTES = 16 * MIB
PROBE_SHARE = 4  # what is free must be this many times what a check takes
ARENA_BLOCK_BYTES = 2 * MIB
ARENA_RESERVE = 4  # times what is committed
TINY_LIMITS = KernelLimits(max_num_seqs=8, num_heads=4, num_kv_heads=2, head_dim=64, vocab_size=512)


class CheckFailed(Exception):
    """The platform does not do what its contract says; the message says what was seen."""

    def __init__(self, message: str, figures: Figures | None = None) -> None:
        super().__init__(message)
        self.figures = figures or {}


class NotSupported(Exception):
    """The platform says itself that it cannot do this."""

    def __init__(self, message: str, figures: Figures | None = None) -> None:
        super().__init__(message)
        self.figures = figures or {}


class NotTried(Exception):
    """It would not be safe, or there is not enough memory to try it with."""


@dataclass(slots=True)
class Found:
    """What a check that passed has to say."""

    figures: Figures = field(default_factory=dict)
    note: str = ""


class Bench:
    """One platform under test. Checks take memory through it, and give it back before they end."""

    def __init__(self, platform: Platform, config: BrimConfig) -> None:
        self.platform = platform
        self.config = config
        self._selection: KernelSelection | None = None

    @property
    def device(self) -> torch.device:
        """Where the platform's tensors live."""
        return self.platform.torch_device()

    @property
    def tensors_count(self) -> bool:
        """Whether tensors take the platform's memory. A scripted device computes on the host and counts only its arenas."""
        return self.platform.capabilities.host_memory or not torch.empty(0, device=self.device).is_cpu

    @property
    def selection(self) -> KernelSelection:
        """The kernels start-up would choose, made for a tiny model."""
        if self._selection is None:
            native = self.config.device.kernels != "torch"
            threads, head_dim = self.config.device.num_threads, TINY_LIMITS.head_dim
            self._selection = select_kernels(self.device, threads, head_dim, native, TINY_LIMITS)
        return self._selection

    def reading(self) -> MemoryReading:
        """A reading after all queued work is done."""
        self.platform.synchronize()
        return self.platform.reading()

    def settle(self) -> None:
        """Nothing queued, nothing cached."""
        self.platform.synchronize()
        self.platform.release_unused()

    def close(self) -> None:
        """Give the kernels back."""
        if self._selection is not None:
            self._selection.kernels.close()
            self._selection = None

    def without(self, what: str, because: str = "") -> NotSupported:
        """That the platform declares no `what`, or that a flag switched it off."""
        return NotSupported(because or f"The platform declares no {what}.")

    def slack_bytes(self, num_bytes: int) -> int:
        """How far readings may be from num_bytes: the allocator's rounding and some noise."""
        return self.platform.capabilities.granularity_bytes + num_bytes // 8

    def probe_bytes(self) -> int:
        """How much a check may take: less where little is free. Raises NotTried where that would not be safe."""
        now = self.reading()
        if self.platform.capabilities.over_allocation_kills and not now.trusted:
            raise NotTried(f"What is free is not known ({now.reason}) and taking too much kills the device.")
        num_bytes = HOST_PROBE_BYTES if self.platform.capabilities.host_memory else DEVICE_PROBE_BYTES
        while num_bytes > LEAST_PROBE_BYTES and now.free_bytes < PROBE_SHARE * num_bytes:
            num_bytes //= 2
        self.require_free(num_bytes)
        return num_bytes

    def require_free(self, num_bytes: int) -> None:
        """Raises NotTried unless several times num_bytes are free."""
        free_bytes = self.reading().free_bytes
        if free_bytes < PROBE_SHARE * num_bytes:
            raise NotTried(
                f"{format_bytes(free_bytes)} are free, and this takes {format_bytes(num_bytes)} of at least "
                f"{PROBE_SHARE} times as much; free some memory and run it again."
            )

    @contextlib.contextmanager
    def taken(self, num_bytes: int) -> Iterator[None]:
        """num_bytes held and touched while inside: by a tensor, or by an arena where tensors do not count."""
        give_back = self._take_tensor(num_bytes) if self.tensors_count else self._take_arena(num_bytes)
        try:
            yield
        finally:
            give_back()
            self.settle()

    def _take_tensor(self, num_bytes: int) -> Callable[[], None]:
        held = [torch.empty(num_bytes, dtype=torch.uint8, device=self.device).fill_(1)]
        self.platform.synchronize()
        return held.clear

    def _take_arena(self, num_bytes: int) -> Callable[[], None]:
        arena = new_arena(self.platform, num_bytes, 1)
        try:
            arena.commit(1)
        except BaseException:
            arena.close()
            raise
        return arena.close

    @contextlib.contextmanager
    def arena(self) -> Iterator[tuple[Arena, int]]:
        """An arena with nothing committed and the number of blocks a check may commit; it reserves several times that.

        Where blocks cannot be committed later, all that it has is there from the start."""
        block_bytes = round_up(ARENA_BLOCK_BYTES, self.platform.capabilities.granularity_bytes)
        blocks = max(2, self.probe_bytes() // 2 // block_bytes)
        self.require_free(blocks * block_bytes)
        later = self.platform.capabilities.reserve_commit
        arena = new_arena(self.platform, block_bytes, ARENA_RESERVE * blocks if later else blocks)
        try:
            yield arena, blocks
        finally:
            self.platform.synchronize()
            arena.close()

    def view(self, arena: Arena) -> torch.Tensor:
        """The arena's whole range as bytes, committed or not: [reserved_bytes]."""
        return self.platform.memory_view(arena.address, arena.max_blocks * arena.block_bytes)
