"""`brim ps`: the servers of this machine and the memory each holds. Owns the table; asks every instance over its /memory."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brim.cli.tables import print_table
from brim.units import format_bytes

if TYPE_CHECKING:
    from brim.server.instances import Instance

_HEADER = ("NAME", "PID", "URL", "CAP", "HELD", "KV TOKENS", "CONTEXT", "UPTIME")
_TIMEOUT_S = 2.0
_MOST_ASKED_AT_ONCE = 16


def ps(*, as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of the table.")] = False) -> None:
    """List this machine's servers and their memory."""
    from concurrent.futures import ThreadPoolExecutor

    from brim.server.instances import list_instances

    with ThreadPoolExecutor(_MOST_ASKED_AT_ONCE) as pool:
        rows = list(pool.map(describe, list_instances()))
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        print("No Brim server is running on this machine.", file=sys.stderr)
        return
    print_table(_HEADER, [_cells(row) for row in rows], right={1, 3, 4, 5, 6}, stream=sys.stdout)


def describe(instance: Instance) -> dict[str, Any]:
    """One instance as a JSON object; its memory figures are None while it starts or when it does not answer."""
    memory = fetch_memory(instance)
    kv = memory.get("kv", {})
    used = kv["groups"][0]["num_tokens"] if kv.get("groups") else {}
    return {
        "name": instance.name,
        "pid": instance.pid,
        "url": instance.url,
        "state": instance.state if memory or instance.state != "serving" else "no answer",
        "cap_bytes": memory.get("cap_bytes"),
        "held_bytes": memory.get("held_bytes"),
        "kv_tokens_used": used.get("used"),
        "kv_tokens_cached": used.get("cached"),
        "kv_tokens_total": kv.get("kv_tokens"),
        "max_model_len": kv.get("max_model_len"),
        "uptime_s": round(instance.uptime_s, 1),
    }


def fetch_memory(instance: Instance) -> dict[str, Any]:
    """What its /memory says, asked with the instance's own key; empty where it gives no sensible answer in time."""
    import http.client
    import urllib.request

    headers = {"Authorization": f"Bearer {instance.key}"}
    request = urllib.request.Request(f"{instance.url}/memory", headers=headers)
    straight = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is this machine's own
    try:
        with straight.open(request, timeout=_TIMEOUT_S) as answer:
            found = json.loads(answer.read())
    except (OSError, ValueError, http.client.HTTPException):
        return {}
    return found if isinstance(found, dict) else {}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def size(key: str) -> str:
        return format_bytes(row[key]) if row[key] is not None else "-"

    used, total = row["kv_tokens_used"], row["kv_tokens_total"]
    tokens = f"{used:,}/{total:,}" if total is not None else row["state"]
    context = f"{row['max_model_len']:,}" if row["max_model_len"] is not None else "-"
    uptime = format_duration(row["uptime_s"]) if row["uptime_s"] is not None else "-"
    return (row["name"], str(row["pid"]), row["url"], size("cap_bytes"), size("held_bytes"), tokens, context, uptime)


def format_duration(seconds: float) -> str:
    """The two largest units: `format_duration(93784) == '1d 2h'`, `format_duration(59.9) == '59s'`."""
    whole = int(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "m"), (whole % 60, "s")]
    while len(parts) > 1 and parts[0][0] == 0:
        parts = parts[1:]
    return " ".join(f"{count}{unit}" for count, unit in parts[:2])
