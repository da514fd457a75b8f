"""The memory plan: everything a start will take, decided before weights are read. Owns the value and its settling. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace

from brim.errors import MemoryBudgetError
from brim.memory.budget import Budget
from brim.memory.kv_split import KVSplit
from brim.memory.ledger import Ledger
from brim.memory.step_memory import StepLimits
from brim.platforms.base import MemoryReading
from brim.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """kv_blocks are what the start aims at; max_blocks is how far the address range reaches; min_blocks one request's.

    cap_bytes: the hard cap of this process. ceiling_bytes: how far the cap may be raised when "enough" turns out to need
    more than was predicted; equal to cap_bytes for every other request.
    """

    budget: Budget
    limits: StepLimits
    split: KVSplit
    ledger: Ledger
    cap_bytes: int
    ceiling_bytes: int
    kv_blocks: tuple[int, ...]
    min_blocks: tuple[int, ...]
    max_blocks: tuple[int, ...]
    reasons: tuple[str, ...]

    @property
    def kv_bytes(self) -> int:
        """Bytes of kv_blocks, rounding included."""
        return self.split.bytes_for(self.kv_blocks)

    @property
    def kv_tokens(self) -> int:
        """The KV size as users count it; block 0 holds no request's tokens."""
        return (self.kv_blocks[0] - 1) * self.split.layout.block_size

    @property
    def full_length_requests(self) -> int:
        """Requests of max_model_len that fit at once."""
        return self.split.full_length_requests(self.kv_blocks)

    def raised(self, reading: MemoryReading) -> MemoryPlan:
        """The plan after a neighbour left: "max" takes what it gave back. What one took is `settle`'s and lowers no cap."""
        now_bytes = reading.reachable_bytes - self.budget.reserve_bytes
        more_bytes = now_bytes - self.ceiling_bytes
        if self.budget.request.kind != "max" or more_bytes <= 0:
            return self
        reason = f"Other processes gave back {format_bytes(more_bytes)} since the plan was made."
        return replace(self, cap_bytes=now_bytes, ceiling_bytes=now_bytes, reasons=(*self.reasons, reason))

    def settle(self, held_bytes: int, reachable_bytes: int | None = None) -> MemoryPlan:
        """The plan with KV sized by what is really held: held_bytes is everything but KV, measured.

        "enough" keeps its blocks and moves its cap (up to the ceiling); every other request keeps its cap and moves its
        blocks. reachable_bytes: what is there now, less the reserve, where neighbours may have taken some of the room; it bounds
        the blocks and not the cap, so that they can grow when it comes back. The ledger keeps the predictions. Raises
        MemoryBudgetError where one full-length request no longer fits.
        """
        limit_bytes = self.ceiling_bytes if reachable_bytes is None else min(self.ceiling_bytes, reachable_bytes)
        room_bytes = limit_bytes - held_bytes
        blocks = self.split.within(room_bytes)
        if blocks is None:
            need_bytes = held_bytes + self.split.bytes_for(self.min_blocks)
            raise MemoryBudgetError(
                f"Measured: {format_bytes(held_bytes)} are held without KV cache and one request of "
                f"{self.limits.max_model_len:,} tokens needs {format_bytes(self.split.bytes_for(self.min_blocks))}; "
                f"the cap is {format_bytes(self.ceiling_bytes)}, of which {format_bytes(limit_bytes)} are there.",
                ledger=self.ledger,
                nearest=(f"--memory {_whole_mib(need_bytes)}MiB",),
            )
        blocks = tuple(min(count, most) for count, most in zip(blocks, self.max_blocks, strict=True))
        if not self.budget.decided_by_plan:
            return replace(self, kv_blocks=blocks)
        blocks = tuple(min(count, aim) for count, aim in zip(blocks, self.split.enough, strict=True))
        return replace(self, kv_blocks=blocks, cap_bytes=held_bytes + self.split.bytes_for(blocks))


def _whole_mib(num_bytes: int) -> int:
    return -(-num_bytes // (1 << 20))
