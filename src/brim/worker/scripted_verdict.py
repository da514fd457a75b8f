"""What must hold for a scenario's run, and what did not. Owns the judgement and the true optimum; `scripted_run` runs.

What must hold for each scenario, whatever it expects:
    the process never held more than its cap, at any moment, by the device's own truth
    no line of any ledger is negative, and the ledger adds up to the device
    readings that are wrong are reported as untrusted with a reason, and nobody else's are
    every request gets an answer, and everything is given back at the end
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from brim.errors import BrimError, MemoryBudgetError
from brim.memory.kv_split import KVSplit
from brim.memory.ledger import Ledger
from brim.memory.report import ledger_json
from brim.platforms.scenario import Scenario
from brim.platforms.scripted_device import ARENA, ScriptedDevice
from brim.units import format_bytes
from brim.worker.graph_choice import GraphChoice
from brim.worker.scripted_start import ScriptedStart, config_of


@dataclass(slots=True)
class Served:
    """What serving gave: tokens and failures by request, and what the guard did."""

    num_tokens: int = 0
    errors: list[str] = field(default_factory=list)
    num_unanswered: int = 0
    num_steps: int = 0
    num_shrinks: int = 0
    num_grows: int = 0


@dataclass(slots=True)
class RunResult:
    """One start and what it served. optimum_tokens: the most KV tokens that a start which knew everything could have had.

    wrong: what did not hold, one sentence each; empty is well."""

    start: ScriptedStart
    seconds: float
    kv_tokens: int = 0
    optimum_tokens: int = 0
    served: Served = field(default_factory=Served)
    wrong: list[str] = field(default_factory=list)
    report: str = ""
    ledger: Ledger | None = None
    untrusted: str = ""
    graphs: GraphChoice | None = None

    @property
    def share(self) -> float | None:
        """KV tokens of the optimum's; None where it did not start."""
        return None if self.start.worker is None else self.kv_tokens / max(1, self.optimum_tokens)

    @property
    def outcome(self) -> str:
        """In a few words."""
        if self.start.error is not None:
            return f"refuses: {type(self.start.error).__name__}"
        return " ".join(["starts", *(f"without {one.feature}" for one in self.start.avoided)])


def verdict_json(scenario: Scenario, results: Sequence[RunResult]) -> dict[str, Any]:
    """The whole scenario as plain values: the last start's figures, and what did not hold in any."""
    last = results[-1]
    return {
        "title": scenario.title,
        "sources": list(scenario.sources),
        "reported": scenario.reported,
        "outcome": last.outcome,
        "reason": None if last.start.error is None else str(last.start.error),
        "ok": not any(result.wrong for result in results),
        "wrong": [wrong for result in results for wrong in result.wrong],
        "kv_tokens": last.kv_tokens,
        "optimum_tokens": last.optimum_tokens,
        "share": last.share,
        "expected_share": scenario.expect.kv_of_optimum if last.share is not None else None,
        "untrusted": last.untrusted,
        "graph_mode": None if last.graphs is None else last.graphs.mode,
        "graph_mode_reason": None if last.graphs is None else last.graphs.reason,
        "without": [{"feature": one.feature, "reason": one.reason} for one in last.start.avoided],
        "requests": scenario.serving.requests if last.share is not None else 0,
        "failed_requests": len(last.served.errors),
        "tokens": last.served.num_tokens,
        "shrinks": last.served.num_shrinks,
        "grows": last.served.num_grows,
        "events": last.start.device.log,
        "report": last.report,
        "ledger": None if last.ledger is None else ledger_json(last.ledger.lines),
        "seconds": sum(result.seconds for result in results),
    }


def optimum_bytes(scenario: Scenario, device: ScriptedDevice, reserve_bytes: int) -> int:
    """The cap by the truth, less what everything but KV needs."""
    request = config_of(scenario).memory.memory
    limits = [device.total_bytes, device.script.host.total_bytes or device.total_bytes]
    if device.script.host.group_bytes:
        limits.append(device.script.host.group_bytes)
    total_bytes = min(limits)
    used_bytes = device.neighbours_bytes + (device.script.host.used_bytes if total_bytes not in limits[2:] else 0)
    reach_bytes = total_bytes - used_bytes
    cap_bytes = reach_bytes - reserve_bytes
    if request is not None and request.kind == "bytes":
        cap_bytes = min(request.num_bytes, reach_bytes)
    elif request is not None and request.kind == "fraction":
        cap_bytes = min(cap_bytes, total_bytes * request.per_million // 1_000_000)
    return cap_bytes - device.most_needed_bytes


def tokens_within(split: KVSplit, num_bytes: int) -> int:
    """KV tokens of the largest split of so many bytes; 0 where not one request fits."""
    blocks = split.within(num_bytes)
    return 0 if blocks is None else (blocks[0] - 1) * split.layout.block_size


def note_start(scenario: Scenario, result: RunResult) -> None:
    """What can be said once the worker is ready."""
    worker, platform = result.start.worker, result.start.platform
    assert worker is not None and platform is not None, "it started"
    plan = worker.ready.plan
    result.kv_tokens, result.ledger, result.report = plan.kv_tokens, worker.ledger, worker.startup_report()
    devices = [one.device for one in result.start.all_ranks]
    rooms_bytes = [optimum_bytes(scenario, device, plan.budget.reserve_bytes) for device in devices]
    result.optimum_tokens = tokens_within(plan.split, min(rooms_bytes))
    if plan.budget.decided_by_plan:
        result.optimum_tokens = min(result.optimum_tokens, (plan.split.enough[0] - 1) * plan.split.layout.block_size)
    reading = platform.reading()
    result.untrusted = "" if reading.trusted else reading.reason or "no reason"
    result.wrong += _wrong_lines(plan.ledger, "the plan's ledger")
    for one in result.start.all_ranks:
        assert one.worker is not None, "all ranks start, or none"
        result.wrong += _wrong_lines(one.worker.ledger, "the ledger")
        result.wrong += _wrong_sum(one.worker.ledger, platform.capabilities.granularity_bytes)
        if one.worker.committed_blocks != worker.committed_blocks:
            result.wrong.append(f"ranks differ: {one.worker.committed_blocks} and {worker.committed_blocks} blocks")
    expected = scenario.expect
    if expected.outcome != "starts":
        result.wrong.append("it starts, but should refuse" + (f" with {expected.error}" if expected.error else ""))
    share = result.share or 0.0
    block = plan.split.layout.block_size
    slack = 0 if plan.kv_blocks == plan.min_blocks else 2 * block
    if share < expected.kv_of_optimum:
        result.wrong.append(f"KV is {share:.4f} of the optimum: {result.kv_tokens:,} of {result.optimum_tokens:,} tokens")
    if result.kv_tokens > result.optimum_tokens + slack:
        result.wrong.append(f"KV is more than there is room for: {result.kv_tokens:,} of {result.optimum_tokens:,} tokens")
    if bool(expected.untrusted) != bool(result.untrusted) or expected.untrusted not in result.untrusted:
        result.wrong.append(f"readings are untrusted for '{result.untrusted}', expected '{expected.untrusted}'")
    if result.untrusted and "not trusted" not in " ".join(plan.reasons):
        result.wrong.append("the plan does not say that readings are untrusted")
    without = tuple(one.feature for one in result.start.avoided)
    if without != expected.without:
        result.wrong.append(f"it starts without {without}, expected {expected.without}")
    result.graphs = worker.ready.committed.captured.graphs
    mode = result.graphs.mode
    if expected.graph_mode and mode != expected.graph_mode:
        result.wrong.append(f"graph mode {mode}, expected {expected.graph_mode}")
    if expected.max_model_len and plan.limits.max_model_len != expected.max_model_len:
        result.wrong.append(f"a context of {plan.limits.max_model_len}, expected {expected.max_model_len}")
    if result.kv_tokens < expected.least_tokens:
        result.wrong.append(f"{result.kv_tokens} KV tokens, expected at least {expected.least_tokens}")


def judge_refusal(scenario: Scenario, result: RunResult) -> None:
    """The right error with the right reason, and nothing over the cap on the way."""
    error, expected = result.start.error, scenario.expect
    assert error is not None, "it did not start"
    if expected.outcome != "refuses":
        result.wrong.append(f"it does not start: {error}")
    else:
        if type(error).__name__ != expected.error:
            result.wrong.append(f"it refuses with {type(error).__name__} ({error}), expected {expected.error}")
        if not re.search(expected.reason, str(error)):
            result.wrong.append(f"it says '{error}', expected '{expected.reason}'")
    result.ledger = _ledger_of(error)
    if isinstance(error, MemoryBudgetError):
        if result.ledger is None:
            result.wrong.append("the refusal has no ledger")
        else:
            result.wrong += _wrong_lines(result.ledger, "the refusal's ledger")
    for one in result.start.all_ranks:
        if one.device.over_cap_bytes:
            result.wrong.append(f"the cap was passed: {one.device.log}")
        if one.error is None:
            result.wrong.append("a rank goes on alone")


def _ledger_of(error: BrimError) -> Ledger | None:
    ledger = getattr(error, "ledger", None)
    return ledger if isinstance(ledger, Ledger) else None


def _wrong_lines(ledger: Ledger, what: str) -> list[str]:
    lines = [line for line in ledger.lines if line.num_bytes < 0]
    return [f"{what} has {format_bytes(line.num_bytes)} for {line.category}, {line.owner}" for line in lines]


def _wrong_sum(ledger: Ledger, granularity_bytes: int) -> list[str]:
    """The whole account against the device's total."""
    set_aside = sum(line.num_bytes for line in ledger.lines if line.owner == "set aside for requests")
    off = sum(line.num_bytes for line in ledger.lines) - set_aside - ledger.total_bytes
    if abs(off) <= max(granularity_bytes, 4096):
        return []
    return [f"the ledger is {format_bytes(off)} off the device's total of {format_bytes(ledger.total_bytes)}"]


def judge_served(scenario: Scenario, result: RunResult) -> None:
    """Every request answered, as many failed as expected, and the guard did what it should."""
    served, expected, script = result.served, scenario.expect, scenario.serving
    if served.num_unanswered:
        result.wrong.append(f"{served.num_unanswered} requests have no answer: {served.errors[:1]}")
    if len(served.errors) != expected.failed_requests:
        result.wrong.append(f"{len(served.errors)} requests failed, expected {expected.failed_requests}: {served.errors[:1]}")
    wanted = (script.requests - expected.failed_requests) * script.output
    if served.num_tokens < wanted:
        result.wrong.append(f"{served.num_tokens} tokens of {wanted} came")
    if served.num_shrinks < expected.shrinks or served.num_grows < expected.grows:
        result.wrong.append(f"the guard shrank {served.num_shrinks} and grew {served.num_grows} times, expected at least "
                            f"{expected.shrinks} and {expected.grows}")  # fmt: skip


def judge_device(scenario: Scenario, result: RunResult) -> None:
    """By the truth."""
    allowed = scenario.expect.over_cap_steps
    for device in [one.device for one in result.start.all_ranks]:
        if device.over_cap_bytes and (not allowed or device.over_cap_steps > allowed or device.was_over_before_serving):
            result.wrong.append(f"the cap was passed for {device.over_cap_steps} steps: {device.log}")
        if device.lost:
            result.wrong.append("the device was lost")


def judge_end(result: RunResult) -> None:
    """Nothing of the cache is left."""
    for device in [one.device for one in result.start.all_ranks]:
        left_bytes = device.ours.get(ARENA, 0)
        if left_bytes or device.live_bytes < 0:
            result.wrong.append(f"{format_bytes(left_bytes)} of the cache were not given back")
