"""From what the user asked for to the cap in bytes. Owns that arithmetic and its explanation. Torch-free.

max       ours + free - reserve
bytes     the number given; refused where ours + free is less
fraction  the share of the total, at most ours + free - reserve
enough    at most ours + free - reserve; the plan lowers it to what is needed
"""

from __future__ import annotations

from dataclasses import dataclass

from brim.config.schema import MemoryRequest
from brim.errors import MemoryBudgetError
from brim.memory.ledger import Ledger, LedgerLine
from brim.platforms.base import MemoryReading
from brim.units import format_bytes


@dataclass(frozen=True, slots=True)
class Budget:
    """cap_bytes: the most this process may hold; for "enough" the ceiling below which the plan chooses.

    reserve_bytes: what stays free. reasons: how the number came about, one sentence each.
    """

    request: MemoryRequest
    cap_bytes: int
    reserve_bytes: int
    total_bytes: int
    reasons: tuple[str, ...]

    @property
    def decided_by_plan(self) -> bool:
        """The plan takes what it needs and no more."""
        return self.request.kind == "enough"


def decide_budget(request: MemoryRequest, reading: MemoryReading, reserve_bytes: int, *, reserve_given: bool = False) -> Budget:
    """The cap for a request on a device as it is now.

    reserve_given: the user named the reserve, so an explicit size that would eat into it is refused instead of shrinking it.
    Example: total 24 GiB, ours 1 GiB, free 19 GiB, reserve 1 GiB: max gives 19 GiB, 50 % gives 12 GiB, 85 % gives 19 GiB
    (20.4 GiB are not there), 30 GiB is refused. Raises MemoryBudgetError with the arithmetic.
    """
    reachable_bytes = reading.reachable_bytes
    within_bytes = reachable_bytes - reserve_bytes
    arithmetic = (
        f"{format_bytes(reading.ours_bytes)} held + {format_bytes(reading.free_bytes)} free = {format_bytes(reachable_bytes)}"
    )
    less_reserve = f"{arithmetic}, less the reserve of {format_bytes(reserve_bytes)}"
    reasons = [] if reading.trusted else [f"The device's readings are not trusted: {reading.reason}."]
    cap_bytes = within_bytes
    if request.kind == "bytes":
        cap_bytes = request.num_bytes
        if cap_bytes > reachable_bytes:
            raise _refusal(reading, reserve_bytes, f"--memory {request} is more than there is: {arithmetic}{_others(reading)}.")
        reasons.append(f"--memory {request}: as given.")
        if cap_bytes > within_bytes and reserve_given:
            why = f"--memory {request} leaves less than the reserve: {less_reserve}, is {format_bytes(within_bytes)}."
            raise _refusal(reading, reserve_bytes, why)
        if cap_bytes > within_bytes:
            reserve_bytes = reachable_bytes - cap_bytes
            reasons.append(f"That leaves {format_bytes(reserve_bytes)} free, less than the usual reserve.")
    elif request.kind == "fraction":
        share_bytes = reading.total_bytes * request.per_million // 1_000_000
        total = f"{format_bytes(reading.total_bytes)} ({reading.limit_source})"
        reasons.append(f"--memory {request} of {total} is {format_bytes(share_bytes)}.")
        if share_bytes > within_bytes:
            reasons.append(f"Only {format_bytes(within_bytes)} are there: {less_reserve}{_others(reading)}.")
        cap_bytes = min(share_bytes, within_bytes)
    else:
        most = "at most " if request.kind == "enough" else ""
        reasons.append(f"--memory {request.kind}: {most}{format_bytes(within_bytes)} = {less_reserve}{_others(reading)}.")
    if cap_bytes <= 0:
        raise _refusal(reading, reserve_bytes, f"There is no memory to work with: {less_reserve}{_others(reading)}.")
    return Budget(request, cap_bytes, reserve_bytes, reading.total_bytes, tuple(reasons))


def _others(reading: MemoryReading) -> str:
    if not reading.others_bytes:
        return f" of {format_bytes(reading.total_bytes)} ({reading.limit_source})"
    held = format_bytes(reading.others_bytes)
    return f"; other processes hold {held} of {format_bytes(reading.total_bytes)} ({reading.limit_source})"


def _refusal(reading: MemoryReading, reserve_bytes: int, message: str) -> MemoryBudgetError:
    lines = (
        LedgerLine("context", "this process", reading.ours_bytes, "measured"),
        LedgerLine("other_processes", "other processes", reading.others_bytes, "measured"),
        LedgerLine("reserve", "reserve", reserve_bytes, "computed"),
        LedgerLine("free", "free", reading.free_bytes, "measured"),
    )
    cap_bytes = max(0, reading.reachable_bytes - reserve_bytes)
    return MemoryBudgetError(message, ledger=Ledger(cap_bytes, reading.total_bytes, lines))
