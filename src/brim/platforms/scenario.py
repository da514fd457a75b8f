"""A scenario: a device, what happens on it, a model, settings and what must hold, read from one TOML file. Owns the values and
their reading; nothing runs here. What each key means: docs/scenarios.md.

Unknown keys are errors that name the nearest known one. Sizes are texts such as "79.18GiB" or numbers of bytes.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from brim.config.resolve import nearest_hint
from brim.errors import ConfigError
from brim.platforms.scenario_shapes import SHAPES
from brim.units import MIB, parse_bytes

Like = Literal["cuda", "rocm", "xpu", "cpu"]
Work = Literal["load", "matmul", "attention", "sample", "logprobs", "sort", "step", "prefill", "collective", "graph", "replay"]
Times = Literal["first", "each", "each_size"]
Source = Literal["driver", "allocator"]
FaultPlace = Literal["allocation", "capture", "create", "map", "step"]
FaultKind = Literal["out_of_memory", "error", "lost"]
Lie = Literal["", "stale", "negative", "unsupported", "fixed", "absurd"]
PHASES = ("open", "load", "reserve", "warm", "measure", "capture", "commit", "committing", "prove", "serve")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """How the device's free memory is reported. lie "": the truth. fixed: always free_bytes. page_cache_bytes: of the host, shown
    as used where memory is shared. library_total_bytes: what the management library says; 0: the truth.
    is_listed: the management library shows this process. has_kernel_account: the kernel says what this process holds (XPU)."""

    lie: Lie = ""
    free_bytes: int = 0
    library_total_bytes: int = 0
    is_listed: bool = True
    has_kernel_account: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The host's memory, where the device shares it. used_bytes: by others, page cache not included. group_bytes: the limit of
    our control group; 0: none."""

    total_bytes: int = 0
    used_bytes: int = 0
    page_cache_bytes: int = 0
    group_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceScript:
    """like: whose platform reads the script. outside_bytes: what the driver keeps and no process is shown to hold.

    virtual_memory: addresses can be reserved and backed later; largest_handle_bytes: a larger handle is refused; 0: none is.
    segment_bytes: what the framework's allocator takes at a time. is_wsl: the host says so. integrated: memory is the host's.
    """

    like: Like = "cuda"
    total_bytes: int = 16 << 30
    context_bytes: int = 520 * MIB
    outside_bytes: int = 0
    granularity_bytes: int = 2 * MIB
    virtual_memory: bool = True
    largest_handle_bytes: int = 0
    graphs: bool = True
    over_allocation_loses: bool = False
    integrated: bool = False
    is_wsl: bool = False
    readings: Readings = field(default_factory=Readings)
    host: Host = field(default_factory=Host)


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """Another process holds `bytes` from the moment on that `at` names (a phase) or at that step while serving."""

    name: str
    bytes: int
    at: str = "open"
    step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumer:
    """Something that takes memory when a kind of work happens.

    times: at the first such work, at each, or at each size never seen. bytes + per_row_bytes * rows of the work.
    keeps: it stays; else it is given back when the work is done (an allocator keeps the segment). least_rows: smaller work takes
    nothing. only_in: phases in which it may happen; empty: all. from_step: not before that step while serving.
    """

    name: str
    on: Work
    bytes: int = 0
    per_row_bytes: int = 0
    times: Times = "first"
    source: Source = "driver"
    keeps: bool = True
    least_rows: int = 0
    only_in: tuple[str, ...] = ()
    from_step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """The `at`-th call of a place fails, and `times` - 1 after it. only_in: phases that count; whole: captures of whole steps."""

    on: FaultPlace
    how: FaultKind
    at: int = 1
    times: int = 1
    only_in: tuple[str, ...] = ()
    above_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What is served once it started: requests of `prompt` tokens that each get `output` tokens, all submitted at once."""

    requests: int = 4
    prompt: int = 100
    output: int = 8
    temperature: float = 0.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    top_p: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Expect:
    """What must hold beyond what holds for every scenario.

    outcome: it starts, or refuses with `error` (a class of brim.errors) and a message that matches `reason`. kv_of_optimum: the
    least share. untrusted: a word of the reason why readings are not trusted; "": they are trusted. without: features
    that a start after a death does without. graph_mode "": any. failed_requests: exactly; shrinks, grows: at least that many.
    over_cap_steps: for at most so many steps more may be held than the cap, where a library grows beside the allocator.
    """

    outcome: Literal["starts", "refuses"] = "starts"
    error: str = ""
    reason: str = ""
    kv_of_optimum: float = 0.98
    untrusted: str = ""
    without: tuple[str, ...] = ()
    graph_mode: str = ""
    max_model_len: int = 0
    least_tokens: int = 0
    failed_requests: int = 0
    shrinks: int = 0
    grows: int = 0
    over_cap_steps: int = 0
    same_as_before: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RankChange:
    """A rank whose device differs from the others."""

    rank: int
    total_bytes: int = 0
    neighbour_bytes: int = 0
    context_bytes: int = 0
    fault: Fault | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One file. reported: what the engine of the report did. settings: as flags, underscores for dashes. starts: how often it is
    started on the same machine, one after the other; consumers of first_start_only names take part in the first."""

    title: str
    sources: tuple[str, ...]
    reported: str
    device: DeviceScript
    model: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    neighbours: tuple[Neighbour, ...] = ()
    consumers: tuple[Consumer, ...] = ()
    faults: tuple[Fault, ...] = ()
    serving: Serving = field(default_factory=Serving)
    expect: Expect = field(default_factory=Expect)
    ranks: int = 1
    rank_changes: tuple[RankChange, ...] = ()
    starts: int = 1
    first_start_only: tuple[str, ...] = ()
    note: str = ""


def read_scenario(path: Path) -> Scenario:
    """The scenario of a file. Raises ConfigError naming the file, the table and the key."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The scenario {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The scenario {path} is not valid TOML: {error}.") from error
    return scenario_of(data, str(path))


def scenario_of(data: Mapping[str, Any], where: str) -> Scenario:
    """The scenario that a document describes; `where` names it in errors."""
    given = dict(data)
    given["model"] = _model(given.get("model"), where)
    scenario = _fill(Scenario, given, where)
    for consumer in scenario.consumers:
        _check_phases(consumer.only_in, f"{where}: consumer '{consumer.name}'")
    for fault in scenario.faults:
        _check_phases(fault.only_in, f"{where}: fault")
    _check_phases([n.at for n in scenario.neighbours], f"{where}: neighbours")
    wrong = [name for name in scenario.first_start_only if name not in {c.name for c in scenario.consumers}]
    if wrong:
        raise ConfigError(f"{where}: first_start_only names '{wrong[0]}', which is no consumer.")
    try:
        re.compile(scenario.expect.reason)
    except re.error as error:
        raise ConfigError(f"{where}: [expect] reason is not a pattern: {error}.") from error
    return scenario


def _model(table: Any, where: str) -> dict[str, Any]:
    """A config.json's content: a shape by name with changes, or all of it inline."""
    if not isinstance(table, Mapping):
        raise ConfigError(f'{where}: [model] is missing; write shape = "llama-3.1-8b" or a config.json\'s fields.')
    given = dict(table)
    name = given.pop("shape", None)
    if name is None:
        return given
    if name not in SHAPES:
        raise ConfigError(f"{where}: [model] shape '{name}' is not known{nearest_hint(str(name), SHAPES)}")
    return {**SHAPES[name], **given}


def _check_phases(names: Any, where: str) -> None:
    for name in names:
        if name not in PHASES:
            raise ConfigError(f"{where}: '{name}' is no phase{nearest_hint(name, PHASES)}")


def _fill(cls: type[T], table: Any, where: str) -> T:
    """A dataclass from a table: nested tables, arrays of tables, sizes and plain values, all by the fields' types."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} must be a table.")
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    short = {name.removesuffix("_bytes"): name for name in known}
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key if key in known else short.get(key)
        if name is None:
            raise ConfigError(f"{where}: unknown key '{key}'{nearest_hint(key, {*known, *short})}")
        values[name] = _value(name, hints[name], value, f"{where} {key}")
    missing = [n for n, f in known.items() if n not in values and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise ConfigError(f"{where}: '{missing[0]}' is missing.")
    return cls(**values)


def _value(name: str, hint: Any, value: Any, where: str) -> Any:
    args = get_args(hint)
    inner = next((arg for arg in args if hasattr(arg, "__dataclass_fields__")), None)
    if hasattr(hint, "__dataclass_fields__"):
        return _fill(hint, value, where)
    if inner is not None:
        return _fill(inner, value, where) if type(None) in args else tuple(_fill(inner, entry, where) for entry in value)
    if name == "bytes" or name.endswith("_bytes"):
        return _size(value, where)
    if get_origin(hint) is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a table.")
        return dict(value)
    literals = [arg for arg in args if isinstance(arg, str)]
    if literals and value not in literals:
        raise ConfigError(f"{where}: '{value}' is not one of {', '.join(word or '(empty)' for word in literals)}.")
    if Ellipsis in args:
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise ConfigError(f"{where} must be a list of texts.")
        return tuple(value)
    wanted = [kind for kind in (bool, int, float, str) if hint is kind or kind in args]
    if wanted and not any(type(value) is kind for kind in wanted) and not (wanted == [float] and type(value) is int):
        raise ConfigError(f"{where} must be of type {wanted[0].__name__}, not {value!r}.")
    return value


def _size(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ConfigError(f'{where} must be a size such as "40GiB", not {value!r}.')
    try:
        return value if isinstance(value, int) else parse_bytes(value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
