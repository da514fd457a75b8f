"""Prints memory for people and for machines: the ledger as a table of 80 columns, phases, KV. Owns form only. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from brim.memory.ledger import CATEGORIES, OURS, Ledger, LedgerLine
from brim.memory.plan import MemoryPlan
from brim.memory.profiling import PhaseRecord
from brim.units import format_bytes

WIDTH = 80
_CATEGORY, _BYTES, _KNOWN = 16, 12, 9
_OWNER = WIDTH - _CATEGORY - _BYTES - _KNOWN - 4


def format_ledger(ledger: Ledger) -> str:
    """The account by category: what we hold, the cap and its headroom, then what is not ours. At most 80 columns."""
    rows = [_row("category", "owner", "bytes", "known by"), _rule()]
    rows += [_line(line) for line in _ordered(ledger.lines) if line.category in OURS]
    rows += [_rule(), _row("held", "this process", format_bytes(ledger.held_bytes), "")]
    rows.append(_row("cap", "this process", format_bytes(ledger.cap_bytes), ""))
    name = "headroom" if ledger.headroom_bytes >= 0 else "OVER THE CAP"
    rows.append(_row(name, "", format_bytes(abs(ledger.headroom_bytes)), ""))
    outside = [_line(line) for line in _ordered(ledger.lines) if line.category not in OURS]
    rows += [_rule(), *outside] if outside else []
    rows.append(_row("total", "device or limit", format_bytes(ledger.total_bytes), ""))
    return "\n".join(row.rstrip() for row in rows)


def format_phases(records: Sequence[PhaseRecord]) -> str:
    """Each phase with its duration, what it took, what it held for a while, and its peak."""
    head = f"{'phase':<14}{'seconds':>10}{'took':>14}{'for a while':>14}{'peak':>14}{'neighbours':>14}"
    rows = [head, "-" * len(head)]
    for record in records:
        change = record.change
        neighbours = format_bytes(change.neighbours_bytes) if change.neighbours_bytes else "-"
        rows.append(
            f"{_fit(record.name, 14)}{record.seconds:>10.2f}{format_bytes(change.ours_bytes):>14}"
            f"{format_bytes(record.transient_bytes):>14}{format_bytes(record.peak_ours_bytes):>14}{neighbours:>14}"
        )
    seconds = sum(record.seconds for record in records)
    peak_bytes = max((record.peak_ours_bytes for record in records), default=0)
    rows.append(f"{'all':<14}{seconds:>10.2f}{'':>28}{format_bytes(peak_bytes):>14}")
    return "\n".join(rows)


def format_kv(plan: MemoryPlan) -> str:
    """KV in the words users count in: tokens and requests of full length."""
    blocks = ", ".join(
        f"{count:,} blocks {group.kind}" + (f" (window {group.window:,})" if group.window else "")
        for count, group in zip(plan.kv_blocks, plan.split.layout.groups, strict=True)
    )
    requests = plan.full_length_requests
    most = f" (all of --max-num-seqs {plan.limits.max_num_seqs})" if requests == plan.limits.max_num_seqs else ""
    plural = "" if requests == 1 else "s"
    return (
        f"KV cache: {format_bytes(plan.kv_bytes)}, {plan.kv_tokens:,} tokens\n"
        f"  {requests} full-length request{plural} of {plan.limits.max_model_len:,} tokens at once{most}\n"
        f"  {blocks}"
    )


def format_start(plan: MemoryPlan, ledger: Ledger, records: Sequence[PhaseRecord]) -> str:
    """The start-up report: phases, ledger, KV and how the cap came about."""
    reasons = "\n".join(_wrapped(reason) for reason in plan.reasons)
    return "\n\n".join(part for part in (format_phases(records), format_ledger(ledger), format_kv(plan), reasons) if part)


def ledger_json(lines: Iterable[LedgerLine]) -> list[dict[str, object]]:
    """One object a line: category, owner, bytes, known_by."""
    return [{"category": x.category, "owner": x.owner, "bytes": x.num_bytes, "known_by": x.known_by} for x in lines]


def kv_json(plan: MemoryPlan) -> dict[str, object]:
    """KV as numbers."""
    groups = [
        {
            "kind": group.kind,
            "window": group.window,
            "layers": len(group.layers),
            "blocks": count,
            "block_bytes": group.block_bytes,
        }
        for count, group in zip(plan.kv_blocks, plan.split.layout.groups, strict=True)
    ]
    return {
        "bytes": plan.kv_bytes,
        "tokens": plan.kv_tokens,
        "block_size": plan.split.layout.block_size,
        "max_model_len": plan.limits.max_model_len,
        "full_length_requests": plan.full_length_requests,
        "groups": groups,
    }


def phases_json(records: Iterable[PhaseRecord]) -> list[dict[str, object]]:
    """Phases as numbers."""
    return [
        {
            "name": record.name,
            "seconds": round(record.seconds, 6),
            "bytes": record.change.ours_bytes,
            "transient_bytes": record.transient_bytes,
            "peak_bytes": record.peak_ours_bytes,
            "neighbours_bytes": record.change.neighbours_bytes,
            "free_bytes_after": record.after.reading.free_bytes,
            "trusted": record.change.trusted,
            "ledger": ledger_json(record.lines),
        }
        for record in records
    ]


def report_json(plan: MemoryPlan, ledger: Ledger, records: Sequence[PhaseRecord] = ()) -> dict[str, object]:
    """Everything for `--json` and the memory page."""
    return {
        "cap_bytes": ledger.cap_bytes,
        "total_bytes": ledger.total_bytes,
        "held_bytes": ledger.held_bytes,
        "headroom_bytes": ledger.headroom_bytes,
        "reserve_bytes": plan.budget.reserve_bytes,
        "memory": str(plan.budget.request),
        "ledger": ledger_json(ledger.lines),
        "kv": kv_json(plan),
        "phases": phases_json(records),
        "reasons": list(plan.reasons),
    }


def _ordered(lines: Iterable[LedgerLine]) -> list[LedgerLine]:
    return sorted(lines, key=lambda line: CATEGORIES.index(line.category))


def _line(line: LedgerLine) -> str:
    return _row(line.category, line.owner, format_bytes(line.num_bytes), line.known_by)


def _row(category: str, owner: str, size: str, known_by: str) -> str:
    return f"{_fit(category, _CATEGORY)} {_fit(owner, _OWNER)} {size:>{_BYTES}}  {known_by:<{_KNOWN}}"


def _rule() -> str:
    return "-" * WIDTH


def _fit(text: str, width: int) -> str:
    return f"{text:<{width}}" if len(text) <= width else text[: width - 1] + "~"


def _wrapped(text: str) -> str:
    rows, row = [], ""
    for word in text.split():
        if row and len(row) + 1 + len(word) > WIDTH:
            rows.append(row)
            row = "  " + word
        else:
            row = f"{row} {word}" if row else word
    return "\n".join([*rows, row])
