"""`brim ps`: the servers of this machine, its accelerators and who holds their memory. Owns the tables; asks every instance over
its /memory, and the management libraries for the devices."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brim.cli.tables import print_table
from brim.units import format_bytes

if TYPE_CHECKING:
    from brim.server.instances import Instance

_SERVERS = ("NAME", "PID", "HELD", "OF CAP", "KV", "UP", "URL")
_DEVICES = ("DEVICE", "PID", "WHO", "HELD", "SHARE")
_NAME, _WHO = 12, 34  # characters: both tables fit 80 columns
_TIMEOUT_S = 2.0
_MOST_ASKED_AT_ONCE = 16


def ps(*, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the tables.")] = False) -> None:
    """List this machine's servers and its accelerators, with the memory each process holds."""
    from concurrent.futures import ThreadPoolExecutor

    from brim.machine import local_devices
    from brim.server.instances import list_instances

    with ThreadPoolExecutor(_MOST_ASKED_AT_ONCE) as pool:
        asked = pool.submit(local_devices)
        servers = list(pool.map(describe, list_instances()))
        devices = named(asked.result(), servers)
    if as_json:
        print(json.dumps({"servers": servers, "devices": devices}, indent=2))
        return
    if servers:
        print_table(_SERVERS, [_cells(row) for row in servers], right={1, 2, 3, 4}, stream=sys.stdout)
    else:
        print("No Brim server is running on this machine.", file=sys.stderr)
    if devices:
        print()
        print_table(_DEVICES, [row for device in devices for row in _device_rows(device)], right={1, 3, 4}, stream=sys.stdout)


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


def named(devices: Sequence[dict[str, Any]], servers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The devices with `server` at each process: the Brim it is of (its engine is a child of the server), or None."""
    by_pid = {server["pid"]: server["name"] for server in servers}

    def of_server(process: dict[str, Any]) -> dict[str, Any]:
        return {**process, "server": by_pid.get(process["pid"]) or by_pid.get(process["parent_pid"])}

    return [{**one, "processes": one["processes"] and [of_server(process) for process in one["processes"]]} for one in devices]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    held, cap = _size(row["held_bytes"]), _size(row["cap_bytes"])
    used, total = row["kv_tokens_used"], row["kv_tokens_total"]
    share = _share(used, total) if total is not None else row["state"]
    return (_fit(row["name"], _NAME), str(row["pid"]), held, cap, share, format_duration(row["uptime_s"]), row["url"])


def _device_rows(device: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    total, used, free = device["total_bytes"], device["used_bytes"], device["free_bytes"]
    size = f" ({format_bytes(total)})" if total is not None else f" ({format_bytes(free)} free)" if free is not None else ""
    name = _fit(device["name"], _WHO - len(size)) + size
    yield (f"{device['platform']} {device['index']}", "", name, _size(used), _share(used, total))
    if device["processes"] is None:
        yield ("", "", "processes are not listed here", "", "")
        return
    for process in device["processes"]:
        who = f"brim: {process['server']}" if process["server"] else process["name"] or "not to be seen from here"
        held = process["num_bytes"]
        yield ("", str(process["pid"]), _fit(who, _WHO), format_bytes(held), _share(held, total))
    unnamed = device["unnamed_bytes"]
    if unnamed:
        yield ("", "", "the driver, and who is not listed", format_bytes(unnamed), _share(unnamed, total))


def _size(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else format_bytes(num_bytes)


def _share(part: int | None, whole: int | None) -> str:
    """`_share(1, 3) == '33 %'`; what is there but rounds to nothing is `< 1 %`."""
    if part is None or not whole:
        return "-"
    return "< 1 %" if 0 < part < whole / 200 else f"{part / whole:.0%}".replace("%", " %")


def _fit(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "~"


def format_duration(seconds: float) -> str:
    """The two largest units: `format_duration(93784) == '1d 2h'`, `format_duration(59.9) == '59s'`."""
    whole = int(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "m"), (whole % 60, "s")]
    while len(parts) > 1 and parts[0][0] == 0:
        parts = parts[1:]
    return " ".join(f"{count}{unit}" for count, unit in parts[:2])
