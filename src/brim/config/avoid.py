"""Which feature a start does without after one killed the engine process. Owns suspects, the ladder and the change to a config.

    phase that died     taken away first, then (where that is gone already) ...
    open                compile, vendor kernels
    reserve             virtual memory
    warm, measure       compile, vendor kernels, virtual memory
    capture             graphs, one step down the ladder: whole steps -> PIECEWISE -> NONE
    commit              virtual memory, graphs (captured again over a cache that is built again)
    prove               virtual memory, graphs, compile, vendor kernels

A phase that is not listed (load) has no suspect: its death is the end of the start. All functions here are pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from brim.config.schema import Avoided, BrimConfig, DeviceConfig, Feature, GraphMode
from brim.errors import ConfigError

SUSPECTS: Mapping[str, tuple[Feature, ...]] = {
    "open": ("compile", "vendor_kernels"),
    "reserve": ("virtual_memory",),
    "warm": ("compile", "vendor_kernels", "virtual_memory"),
    "measure": ("compile", "vendor_kernels", "virtual_memory"),
    "capture": ("graphs",),
    "commit": ("virtual_memory", "graphs"),
    "prove": ("virtual_memory", "graphs", "compile", "vendor_kernels"),
}
DOING: Mapping[str, str] = {
    "open": "opening the device",
    "load": "loading weights",
    "reserve": "reserving addresses",
    "warm": "running its first steps",
    "measure": "running the worst steps",
    "capture": "capturing graphs",
    "commit": "committing KV blocks",
    "prove": "proving the worst steps",
}
_FIELDS: Mapping[Feature, str] = {
    "graphs": "graph_mode",
    "compile": "compile",
    "virtual_memory": "arena",
    "vendor_kernels": "kernels",
}
_LADDER: tuple[GraphMode, ...] = ("PIECEWISE", "NONE")  # below every mode that captures whole steps
FORGET = "brim doctor --forget"


@dataclass(frozen=True, slots=True, kw_only=True)
class StartUses:
    """The features a start really uses. graph_modes: all that work on its platform with its kernels."""

    graph_mode: GraphMode = "NONE"
    graph_modes: tuple[GraphMode, ...] = ("NONE",)
    compile: bool = False
    virtual_memory: bool = False
    vendor_kernels: bool = False


def next_avoided(phase: str, uses: StartUses, how: str) -> Avoided | None:
    """What to do without after a death in `phase`; None where nothing is left to take away. how: `SIGABRT`."""
    reason = f"the engine died while {DOING.get(phase, phase)} ({how})"
    for feature in SUSPECTS.get(phase, ()):
        if feature == "graphs":
            lower = _one_step_down(uses)
            if lower is not None:
                return Avoided(feature, lower, reason)
        elif getattr(uses, feature):
            return Avoided(feature, "off", reason)
    return None


def _one_step_down(uses: StartUses) -> GraphMode | None:
    below = [mode for mode in _LADDER if _rank(mode) < _rank(uses.graph_mode)]
    return next((mode for mode in below if mode == "NONE" or mode in uses.graph_modes), None)


def _rank(mode: str) -> int:
    return {"NONE": 0, "PIECEWISE": 1}.get(mode, 2)


def without(avoided: Avoided) -> str:
    """`without graphs`: what the start is like."""
    if avoided.feature == "graphs":
        return "without graphs" if avoided.most == "NONE" else f"with graphs {avoided.most} at most"
    words = {
        "compile": "without torch.compile",
        "virtual_memory": "without virtual memory",
        "vendor_kernels": "with the reference kernels",
    }
    return words[avoided.feature]


def flag_for(avoided: Avoided) -> str:
    """What a user gives to do without it on purpose."""
    if avoided.feature == "graphs":
        return f"--graph-mode {avoided.most}"
    return {"compile": "no --compile", "virtual_memory": "--arena static", "vendor_kernels": "--kernels torch"}[avoided.feature]


def merge(known: Iterable[Avoided], new: Iterable[Avoided]) -> tuple[Avoided, ...]:
    """One entry a feature: of graphs the lower step."""
    merged: dict[Feature, Avoided] = {}
    for one in (*known, *new):
        before = merged.get(one.feature)
        if before is None or (one.feature == "graphs" and _rank(one.most) < _rank(before.most)):
            merged[one.feature] = one
    return tuple(merged.values())


def apply_avoided(config: BrimConfig, avoided: Iterable[Avoided]) -> BrimConfig:
    """The configuration without these features, even where they were asked for; those it does not use change nothing.

    `sources` and `avoided` of the result say what was changed, and why.
    """
    for one in avoided:
        if _is_without(config.device, one):
            continue
        name = _FIELDS[one.feature]
        value: Any = {"graphs": one.most, "compile": False, "virtual_memory": "static", "vendor_kernels": "torch"}[one.feature]
        sources = {**config.sources, name: f"avoided: {one.reason}"}
        device = replace(config.device, **{name: value})
        config = replace(config, device=device, sources=sources, avoided=merge(config.avoided, (one,)))
    return config


def apply_recorded(config: BrimConfig, recorded: Iterable[Avoided]) -> BrimConfig:
    """`apply_avoided` for what earlier starts found. Raises ConfigError where that changes anything and --strict is given."""
    changed = apply_avoided(config, recorded)
    if config.device.strict and changed is not config:
        one = next(one for one in changed.avoided if one not in config.avoided)
        raise ConfigError(
            f"--strict refuses to start {without(one)}, but in an earlier start {one.reason}. Start with {flag_for(one)}, "
            f"drop --strict, or try it again after {FORGET}."
        )
    return changed


def said_of_record(avoided: Iterable[Avoided]) -> str:
    """The line of a start that does without because an earlier one died."""
    chosen = tuple(avoided)
    how = " and ".join(without(one) for one in chosen)
    reasons = dict.fromkeys(one.reason for one in chosen)
    return f"Starting {how}: in an earlier start {'; '.join(reasons)}. --strict refuses instead; {FORGET} clears it."


def said_of_death(avoided: Avoided) -> str:
    """The line between a death and the next try."""
    reason = avoided.reason[:1].upper() + avoided.reason[1:]
    return f"{reason}; starting again {without(avoided)}. --strict refuses instead; {FORGET} clears it."


def _is_without(device: DeviceConfig, avoided: Avoided) -> bool:
    if avoided.feature == "graphs":
        asked = device.graph_mode
        return device.enforce_eager or (asked is not None and _rank(asked) <= _rank(avoided.most))
    if avoided.feature == "compile":
        return not device.compile
    if avoided.feature == "virtual_memory":
        return device.arena == "static"
    return device.kernels == "torch"
