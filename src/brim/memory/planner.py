"""Decides the memory plan, or says with figures why there is none and which settings would fit. Torch-free.

Every suggestion is found by trying: it is named only if the plan it leads to exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from brim.config.schema import MemoryRequest
from brim.errors import MemoryBudgetError
from brim.memory.budget import Budget, decide_budget
from brim.memory.footprint import Footprint
from brim.memory.kv_layout import KVLayout
from brim.memory.kv_split import KVSplit
from brim.memory.ledger import Ledger, LedgerLine
from brim.memory.plan import MemoryPlan
from brim.memory.step_memory import StepLimits
from brim.platforms.base import MemoryReading
from brim.units import format_bytes, round_up

_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """Everything a plan depends on. max_model_len "auto": the longest that fits, at most model_max_len.

    reserve_given: the user named the reserve, so nothing may shrink it. noise_bytes: by how much the reading of another start
    may differ; suggestions leave that much room, so that they start when they are followed.
    """

    memory: MemoryRequest
    reading: MemoryReading
    reserve_bytes: int
    layout: KVLayout
    footprint: Footprint
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int | Literal["auto"]
    model_max_len: int
    granularity_bytes: int = 1
    reserve_given: bool = False
    noise_bytes: int = 0
    reach_whole: bool = False  # reserve addresses for the whole device, so that KV can grow into what a neighbour gives back

    def limits(self, max_model_len: int) -> StepLimits:
        """The step limits at that length."""
        return StepLimits(self.max_num_seqs, self.max_num_batched_tokens, max_model_len)


def make_plan(request: PlanRequest) -> MemoryPlan:
    """The plan. Raises MemoryBudgetError with the ledger and the nearest settings that fit."""
    try:
        budget = _budget(request)
    except MemoryBudgetError as error:
        raise MemoryBudgetError(error.args[0], ledger=error.ledger, nearest=_other_memory(request)) from None
    plan = _try(request, budget)
    if plan is None:
        raise _refusal(request, budget)
    return plan


def _budget(request: PlanRequest) -> Budget:
    return decide_budget(request.memory, request.reading, request.reserve_bytes, reserve_given=request.reserve_given)


def _other_memory(request: PlanRequest) -> list[str]:
    """What would start where the memory asked for is not there at all."""
    most = replace(request, memory=MemoryRequest("max"))
    try:
        budget = _budget(most)
    except MemoryBudgetError:
        return []
    if _try(most, budget) is None:
        return [f"--memory max {flags}" for flags in _smaller(most, budget)]
    whole = MemoryRequest("bytes", num_bytes=budget.cap_bytes - budget.cap_bytes % _MIB)
    exact = replace(request, memory=whole)
    return ["--memory max", *_verified(exact, _budget(exact), f"--memory {whole}")]


def _fits(request: PlanRequest, budget: Budget, limits: StepLimits) -> bool:
    """Whether one request of full length can be served: KV minimum beside everything else, and loading before it."""
    split = KVSplit(request.layout, limits, request.granularity_bytes)
    held_bytes = request.footprint.held_bytes(limits)
    serve_bytes = held_bytes + split.bytes_for(split.minimum)
    return max(serve_bytes, request.footprint.load_peak_bytes) <= budget.cap_bytes


def _try(request: PlanRequest, budget: Budget) -> MemoryPlan | None:
    """The plan of a request under a budget; None where it does not fit."""
    reasons = list(budget.reasons)
    if request.max_model_len == "auto":
        longest = _largest(2, request.model_max_len, lambda n: _fits(request, budget, request.limits(n)))
        if longest is None:
            return None
        limits = request.limits(longest)
        reasons.append(f"--max-model-len auto: {longest:,} tokens are the most of which one request fits.")
    else:
        limits = request.limits(request.max_model_len)
        if not _fits(request, budget, limits):
            return None
    split = KVSplit(request.layout, limits, request.granularity_bytes)
    held_bytes = request.footprint.held_bytes(limits)
    blocks = split.within(budget.cap_bytes - held_bytes)
    assert blocks is not None, "what fits has a split"
    cap_bytes = budget.cap_bytes
    reach_bytes = request.reading.total_bytes if request.reach_whole and budget.request.kind == "max" else cap_bytes
    max_blocks = split.within(reach_bytes - request.footprint.fixed_floor_bytes) or blocks
    if budget.decided_by_plan:
        enough = split.enough
        blocks = tuple(min(count, aim) for count, aim in zip(blocks, enough, strict=True))
        max_blocks = enough
        cap_bytes = min(budget.cap_bytes, max(held_bytes + split.bytes_for(blocks), request.footprint.load_peak_bytes))
        requests = f"{limits.max_num_seqs} requests of {limits.max_model_len:,} tokens"
        if blocks == enough:
            reasons.append(f"Enough for {requests} is {format_bytes(cap_bytes)}.")
        else:
            need = format_bytes(held_bytes + split.bytes_for(enough))
            fit = split.full_length_requests(blocks)
            reasons.append(f"{need} would be enough for {requests}; {fit} fit at once, the others wait.")
    ledger = _ledger(request, budget, cap_bytes, limits).with_line("kv_cache", "KV cache", split.bytes_for(blocks), "computed")
    return MemoryPlan(
        budget=budget,
        limits=limits,
        split=split,
        ledger=ledger,
        cap_bytes=cap_bytes,
        ceiling_bytes=budget.cap_bytes,
        kv_blocks=blocks,
        min_blocks=split.minimum,
        max_blocks=max_blocks,
        reasons=tuple(reasons),
    )


def _ledger(request: PlanRequest, budget: Budget, cap_bytes: int, limits: StepLimits) -> Ledger:
    """Everything but KV."""
    outside = (
        LedgerLine("other_processes", "other processes", request.reading.others_bytes, request.reading.known_by),
        LedgerLine("reserve", "reserve", budget.reserve_bytes, "computed"),
    )
    return Ledger(cap_bytes, budget.total_bytes, (*outside, *request.footprint.lines(limits)))


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """The largest n in [low, high] that fits, where fitting is monotone; None where low does not."""
    if high < low or not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _refusal(request: PlanRequest, budget: Budget) -> MemoryBudgetError:
    """The error with its arithmetic, ledger and verified suggestions."""
    length = 2 if request.max_model_len == "auto" else request.max_model_len
    limits = request.limits(length)
    split = KVSplit(request.layout, limits, request.granularity_bytes)
    held_bytes, kv_bytes = request.footprint.held_bytes(limits), split.bytes_for(split.minimum)
    ledger = _ledger(request, budget, budget.cap_bytes, limits).with_line(
        "kv_cache", "one full-length request", kv_bytes, "computed"
    )
    if request.footprint.load_peak_bytes > max(budget.cap_bytes, held_bytes + kv_bytes):
        what = f"loading the model takes {format_bytes(request.footprint.load_peak_bytes)} at its peak"
    else:
        what = (
            f"one request of {length:,} tokens takes {format_bytes(held_bytes + kv_bytes)} "
            f"({format_bytes(held_bytes)} before KV cache, {format_bytes(kv_bytes)} of KV cache)"
        )
    message = f"The model does not fit: {what}, but the cap is {format_bytes(budget.cap_bytes)}. {' '.join(budget.reasons)}"
    return MemoryBudgetError(message, ledger=ledger, nearest=tuple(nearest_settings(request, budget)))


def nearest_settings(request: PlanRequest, budget: Budget) -> list[str]:
    """Flags that would start, best first, each of them tried; more memory comes last."""
    memory = least_memory(request)
    calm = replace(budget, cap_bytes=budget.cap_bytes - request.noise_bytes)
    return _smaller(request, calm) + ([] if memory is None else [f"--memory {memory}"])


def _smaller(request: PlanRequest, budget: Budget) -> list[str]:
    """A shorter context, fewer sequences, smaller steps; all of them where none alone is enough."""
    found = [
        *_shorter(request, budget),
        *_fewer(request, budget, "max_num_seqs", "--max-num-seqs", 1, 1),
        *_fewer(request, budget, "max_num_batched_tokens", "--max-num-batched-tokens", *_least_step(request)),
    ]
    return found or _all_smaller(request, budget)


def _least_step(request: PlanRequest) -> tuple[int, int]:
    """(least, multiple): a step holds one token of every sequence, and whole blocks."""
    block_size = request.layout.block_size
    return round_up(max(request.max_num_seqs, block_size), block_size), block_size


def _shorter(request: PlanRequest, budget: Budget) -> list[str]:
    if request.max_model_len == "auto":
        return []
    length = _largest(2, request.max_model_len - 1, lambda n: _fits(request, budget, request.limits(n)))
    if length is None:
        return []
    length = max(2, length - length % request.layout.block_size)  # a block is paid for whole: round to one people like
    return _verified(replace(request, max_model_len=length), budget, f"--max-model-len {length}")


def _fewer(request: PlanRequest, budget: Budget, field: str, flag: str, least: int, multiple: int) -> list[str]:
    """The largest smaller multiple of one setting that fits."""

    def changed(n: int) -> PlanRequest:
        return replace(request, **{field: n * multiple})  # type: ignore[arg-type]

    most = (getattr(request, field) - 1) // multiple
    count = _largest(least // multiple, most, lambda n: _try(changed(n), budget) is not None)
    return [] if count is None else _verified(changed(count), budget, f"{flag} {count * multiple}")


def _all_smaller(request: PlanRequest, budget: Budget) -> list[str]:
    """One sequence, steps of one block, and then the longest context."""
    least = request.layout.block_size
    small = replace(request, max_num_seqs=1, max_num_batched_tokens=min(least, request.max_num_batched_tokens))
    flags = f"--max-num-seqs 1 --max-num-batched-tokens {small.max_num_batched_tokens}"
    alone = _verified(small, budget, flags)
    if alone or request.max_model_len == "auto":
        return alone
    return [f"{flags} {more}" for more in _shorter(small, budget)]


def least_memory(request: PlanRequest) -> MemoryRequest | None:
    """The least --memory in whole MiB that would start with these settings; None where the device does not have it."""
    limits = request.limits(2 if request.max_model_len == "auto" else request.max_model_len)
    split = KVSplit(request.layout, limits, request.granularity_bytes)
    serve_bytes = request.footprint.held_bytes(limits) + split.bytes_for(split.minimum)
    need_bytes = round_up(max(serve_bytes, request.footprint.load_peak_bytes) + request.noise_bytes, _MIB)
    memory = MemoryRequest("bytes", num_bytes=need_bytes)
    changed = replace(request, memory=memory)
    try:
        budget = _budget(changed)
    except MemoryBudgetError:
        return None
    return memory if _try(changed, budget) is not None else None


def _verified(request: PlanRequest, budget: Budget, flags: str) -> list[str]:
    return [flags] if _try(request, budget) is not None else []
