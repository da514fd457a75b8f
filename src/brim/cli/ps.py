"""`brim ps`: the servers of this machine and the memory each holds. Owns the table; asks every instance over its /memory."""

from __future__ import annotations

import json
import sys
import urllib.request
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brim.cli.tables import print_table
from brim.units import format_bytes

if TYPE_CHECKING:
    from brim.server.instances import Instance

_HEADER = ("NAME", "PID", "URL", "CAP", "HELD", "KV TOKENS", "CONTEXT", "UPTIME")
_TIMEOUT_S = 2.0


def ps(*, as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of the table.")] = False) -> None:
    """List this machine's servers and their memory."""
    from brim.server.instances import list_instances

    rows = [describe(instance) for instance in list_instances()]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        print("No Brim server is running on this machine.", file=sys.stderr)
        return
    print_table(_HEADER, [_cells(row) for row in rows], right={1, 3, 4, 5, 6}, stream=sys.stdout)


def describe(instance: Instance) -> dict[str, Any]:
    """One instance as a JSON object; its memory figures are None while it starts or when it does not answer."""
    memory = _ask(instance, "/memory") if instance.state != "starting" else None
    models = _ask(instance, "/v1/models") if memory is not None else None
    kv = (memory or {}).get("kv", {})
    groups = kv.get("groups") or [{}]
    tokens = groups[0].get("num_tokens", {})
    return {
        "name": instance.name,
        "pid": instance.pid,
        "url": instance.url,
        "state": instance.state if memory is not None or instance.state == "starting" else "no answer",
        "cap_bytes": (memory or {}).get("cap_bytes"),
        "held_bytes": (memory or {}).get("held_bytes"),
        "kv_tokens_used": tokens.get("used"),
        "kv_tokens_total": kv.get("kv_tokens"),
        "max_model_len": models["data"][0].get("max_model_len") if models else None,
        "uptime_s": instance.uptime_s,
    }


def _ask(instance: Instance, path: str) -> dict[str, Any] | None:
    request = urllib.request.Request(instance.url + path, headers={"Authorization": f"Bearer {instance.key}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is this machine
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as answer:
            value = json.load(answer)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def size(key: str) -> str:
        return format_bytes(row[key]) if row[key] is not None else "-"

    used, total = row["kv_tokens_used"], row["kv_tokens_total"]
    tokens = f"{used:,}/{total:,}" if total is not None else row["state"]
    context = f"{row['max_model_len']:,}" if row["max_model_len"] is not None else "-"
    uptime = format_duration(row["uptime_s"]) if row["uptime_s"] is not None else "-"
    return (row["name"], str(row["pid"]), row["url"], size("cap_bytes"), size("held_bytes"), tokens, context, uptime)


def format_duration(seconds: float) -> str:
    """`format_duration(93784) == '1d 2h'`: the two largest units."""
    whole = int(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "m"), (whole % 60, "s")]
    first = next((i for i, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return " ".join(f"{count}{unit}" for count, unit in parts[first : first + 2] if count or unit == "s" or first == 3) or "0s"
