"""How plans look to people: tables of 80 columns. Owns form only."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import IO, Any

from brim.cli.tables import ledger_of, print_ledger, print_table
from brim.units import format_bytes

WIDTH = 80
_KNOWN = {
    "measured": "its figures were measured on such a device",
    "predicted": "no such device was measured: predicted",
    "here": "as it is now",
}


def print_plans(found: dict[str, Any], stream: IO[str]) -> None:
    """One plan in full; several as a table, with how to start each or why not."""
    plans = found["plans"]
    if len(plans) == 1:
        _one(plans[0], stream)
    else:
        _several(plans, stream)


def print_errors(found: dict[str, Any], out: IO[str]) -> None:
    """How wrong past plans were: each device in a line, then its lines, then each start."""
    _say(out, f"Plans of {len(found['starts'])} starts, by the certificates in {found['folder']}.")
    for device in found["devices"]:
        _say(out, f"\n{device['device']}: {_count(device['starts'], 'start')}")
        median, worst = 100 * device["median_error"], 100 * device["worst_error"]
        print(f"  KV tokens, |real - predicted| / real: median {median:.3f} %, worst {worst:.3f} %", file=out)
        print(f"  {_count(device['gave_fewer_tokens'], 'start')} gave fewer tokens than planned\n", file=out)
        lines = [(x["category"], _signed_bytes(x["median_bytes"]), _signed_bytes(x["worst_bytes"])) for x in device["lines"]]
        print_table(("measured less predicted", "median", "worst"), lines, right={1, 2}, stream=out)
    starts = [
        (_fit(one["file"].removesuffix(".json"), 34), one["memory"], f"{one['predicted_tokens']:,}", f"{one['real_tokens']:,}",
         f"{100 * one['error']:+.3f} %")
        for one in found["starts"]
    ]  # fmt: skip
    if starts:
        print(file=out)
        print_table(("start", "memory", "predicted", "real", "error"), starts, right={2, 3, 4}, stream=out)
    if found["skipped"]:
        _say(out, f"\n{_count(len(found['skipped']), 'file')} of an older version left out.")


def _one(plan: dict[str, Any], out: IO[str]) -> None:
    _say(out, f"{plan['model']} on {plan['device']}: {plan['device_description']} ({_KNOWN[plan['device_known']]})")
    print(file=out)
    if plan["refused"]:
        _refused(plan, out)
        _ranks(plan, out)
        return
    print_ledger(ledger_of(plan["plan"]), out)
    longest = plan["longest_context"]
    limit = ", the model's own limit" if longest["is_the_models_limit"] else ""
    requests = _count(plan["full_length_requests"], "request")
    print(f"\nKV cache           {format_bytes(plan['kv_bytes'])}, {plan['kv_tokens']:,} tokens", file=out)
    print(f"at once            {requests} of {plan['max_model_len']:,} tokens", file=out)
    if longest["tokens"]:
        print(f"longest context    {longest['tokens']:,} tokens{limit}", file=out)
    print(f"computed in        {plan['dtype']}, graphs {plan['graph_mode']}\n", file=out)
    for reason in plan["plan"]["reasons"]:
        _say(out, reason)
    for note in plan["notes"]:
        _say(out, note)
    _ranks(plan, out)
    _changes(plan, out)


def _refused(plan: dict[str, Any], out: IO[str]) -> None:
    refused = plan["refused"]
    _say(out, refused["message"])
    if refused["ledger"]:
        print(file=out)
        print_ledger(ledger_of(refused["ledger"]), out)


def _ranks(plan: dict[str, Any], out: IO[str]) -> None:
    rows = []
    for one in plan["tensor_parallel"]:
        if one["refused"]:
            rows.append((str(one["size"]), "-", "-", "cannot be divided" if "divided" in one["refused"] else "does not fit"))
            continue
        note = "" if one["runs_today"] else "predicted; does not run yet"
        rows.append((str(one["size"]), format_bytes(one["weight_bytes"]), f"{one['kv_tokens']:,}", note))
    print("\nSplit over several such devices", file=out)
    print_table(("devices", "weights each", "KV tokens", ""), rows, right={0, 1, 2}, stream=out)


def _changes(plan: dict[str, Any], out: IO[str]) -> None:
    rows = []
    for one in plan["changes"]:
        if one["refused"]:
            rows.append((one["flags"], "does not fit", "", ""))
            continue
        cap = "" if not one["delta_cap_bytes"] else _signed_bytes(one["delta_cap_bytes"])
        rows.append((one["flags"], f"{one['kv_tokens']:,}", f"{one['delta_kv_tokens']:+,}", cap))
    print("\nWhat other settings come to", file=out)
    print_table(("setting", "KV tokens", "change", "cap"), rows, right={1, 2, 3}, stream=out)
    best = plan["best_change"]
    if best is None:
        _say(out, "\nNone of these gains KV tokens.")
    else:
        _say(out, f"\nMost is gained by {best['flags']}: {best['delta_kv_tokens']:+,} KV tokens.")


def _several(plans: Sequence[dict[str, Any]], out: IO[str]) -> None:
    rows = []
    for plan in plans:
        name = plan["model"].rstrip("/").rpartition("/")[2]
        if plan["refused"]:
            rows.append((_fit(name, 18), _fit(plan["device"], 14), "-", "-", "-", "does not fit"))
            continue
        held = plan["held_bytes"] - plan["kv_bytes"]
        rows.append(
            (
                _fit(name, 18),
                _fit(plan["device"], 14),
                format_bytes(held),
                format_bytes(plan["kv_bytes"]),
                f"{plan['kv_tokens']:,}",
                plan["device_known"],
            )
        )
    print_table(("model", "device", "beside KV", "KV cache", "KV tokens", "known by"), rows, right={2, 3, 4}, stream=out)
    shares = [plan for plan in plans if "share_bytes" in plan]
    if shares:
        print(file=out)
        for plan in shares:
            print(f"on {plan['device']}: brim serve {plan['model']} --memory {plan['memory']}", file=out)
    for plan in plans:
        if plan["refused"]:
            _say(out, f"\n{plan['model']} on {plan['device']}: {plan['refused']['message']}")


def _say(out: IO[str], text: str) -> None:
    lead = "\n" * (len(text) - len(text.lstrip("\n")))
    print(lead + textwrap.fill(text.strip("\n"), WIDTH, break_long_words=False, break_on_hyphens=False), file=out)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _signed_bytes(num_bytes: int) -> str:
    return ("+" if num_bytes > 0 else "") + format_bytes(num_bytes)


def _fit(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "~"
