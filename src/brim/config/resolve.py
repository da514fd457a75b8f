"""Flags, environment and file become one frozen BrimConfig whose values keep their source.

Precedence: flag > environment (BRIM_<FIELD>) > file (TOML, `--config`) > default. Unknown keys are errors that name the
nearest known one. Owns parsing of setting texts; what a setting means is `schema`'s.
"""

from __future__ import annotations

import difflib
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from brim.config.schema import (
    BrimConfig,
    DeviceConfig,
    MemoryConfig,
    MemoryRequest,
    ModelConfig,
    SchedulerConfig,
    ServerConfig,
)
from brim.errors import ConfigError
from brim.units import parse_bytes

_SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "memory": MemoryConfig,
    "scheduler": SchedulerConfig,
    "device": DeviceConfig,
    "server": ServerConfig,
}
_ALIASES = {"gpu_memory_utilization": "memory", "api_key": "api_keys", "reserve": "reserve_bytes"}
_NOT_SETTINGS = frozenset({"config", "cache_dir"})  # BRIM_* variables with a reader of their own
_LARGEST_COUNT = (1 << 31) - 1
_LARGEST_SEED = (1 << 63) - 1
_PERCENT = re.compile(r"(-?[0-9]{1,20}(?:\.[0-9]{1,20})?)\s*%")
_FRACTION = re.compile(r"-?[0-9]{0,20}\.[0-9]{1,20}")
_POSITIVE = frozenset({"max_num_seqs", "max_num_batched_tokens", "block_size", "num_threads", "max_body_bytes"})


def parse_memory(text: str) -> MemoryRequest:
    """`max`, `enough`, `40GiB`, `85%`, or vLLM's fraction `0.85`. Raises ConfigError with an example otherwise."""
    word = text.strip().lower()
    if word == "max":
        return MemoryRequest("max")
    if word == "enough":
        return MemoryRequest("enough")
    if percent := _PERCENT.fullmatch(word):
        return _fraction("--memory", text, float(percent.group(1)) * 10_000)
    if _FRACTION.fullmatch(word):
        return _fraction("--memory", text, float(word) * 1_000_000)
    try:
        num_bytes = parse_bytes(word)
    except ConfigError:
        raise ConfigError(
            f"--memory '{text}' is not understood; write max, enough, a size such as 40GiB or a share such as 85%."
        ) from None
    if num_bytes <= 0:
        raise ConfigError(f"--memory {text} is not more than zero; write for example --memory 40GiB.")
    return MemoryRequest("bytes", num_bytes=num_bytes)


def parse_utilization(value: Any) -> MemoryRequest:
    """vLLM's `gpu_memory_utilization`: always a fraction of the device, so 1 is all of it and never one byte."""
    try:
        fraction = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"--gpu-memory-utilization '{value}' must be a fraction such as 0.85.") from None
    return _fraction("--gpu-memory-utilization", value, fraction * 1_000_000)


def _fraction(flag: str, value: Any, per_million: float) -> MemoryRequest:
    if not 0.5 <= per_million <= 1_000_000:  # false for not-a-number too
        raise ConfigError(f"{flag} {value} must be more than 0 % and at most 100 % of the device.")
    return MemoryRequest("fraction", per_million=round(per_million))


def known_fields() -> dict[str, tuple[str, Field[Any]]]:
    """Field name -> (section name, dataclass field), for every setting."""
    return {f.name: (section, f) for section, cls in _SECTIONS.items() for f in fields(cls)}


def nearest_hint(key: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known key, or an empty string."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else "."


def resolve(flags: Mapping[str, Any], environment: Mapping[str, str] | None = None, config_file: str | None = None) -> BrimConfig:
    """The configuration from its sources. `flags` holds only what was given (None means not given).

    Raises ConfigError for unknown keys, wrong types, values out of range and two spellings of one setting in one source.
    """
    layers: list[tuple[str, Mapping[str, Any]]] = [("flag", {k: v for k, v in flags.items() if v is not None})]
    if environment is not None:
        layers.append(("env", _from_environment(environment)))
    if config_file is not None:
        layers.append((f"file {config_file}", _from_file(config_file)))
    known = known_fields()
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, layer in layers:
        spelled: dict[str, str] = {}
        for raw_key, value in layer.items():
            key = _ALIASES.get(raw_key, raw_key)
            if key not in known:
                raise ConfigError(f"Unknown setting '{raw_key}' ({source}){nearest_hint(raw_key, {*known, *_ALIASES})}")
            if key in spelled:
                raise ConfigError(f"{_flag(spelled[key])} and {_flag(raw_key)} ({source}) say the same thing; give only one.")
            spelled[key] = raw_key
            converted = _convert(raw_key, key, value, known[key])
            if key not in values:
                values[key] = converted
                sources[key] = f"env BRIM_{raw_key.upper()}" if source == "env" else source
    if "model" not in values:
        raise ConfigError("No model was named; give a local folder, a .gguf file, a hub id, or 'demo'.")
    for name, (_, f) in known.items():
        if name not in values and (f.default is not MISSING or f.default_factory is not MISSING):
            sources[name] = "default"
    sections = {
        section: cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values}) for section, cls in _SECTIONS.items()
    }
    return BrimConfig(**sections, sources=sources)


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """The BRIM_* variables by setting; an empty one counts as not set."""
    known = {*known_fields(), *_ALIASES}
    found = {}
    for name, value in environment.items():
        key = name.removeprefix("BRIM_").lower()
        if not name.startswith("BRIM_") or key in _NOT_SETTINGS:
            continue
        if key not in known:
            raise ConfigError(f"Unknown environment variable {name}{nearest_hint(key, known)}")
        if value:
            found[key] = value
    return found


def _from_file(path: str) -> dict[str, Any]:
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The configuration file {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration file {path} is not valid TOML: {error}.") from error
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            if key not in _SECTIONS:
                raise ConfigError(f"Unknown section [{key}] in {path}{nearest_hint(key, _SECTIONS)}")
            for name, inner in value.items():
                _add(flat, path, name, inner, section=key)
        else:
            _add(flat, path, key, value)
    return flat


def _add(flat: dict[str, Any], path: str, name: str, value: Any, section: str | None = None) -> None:
    """Put one entry of a file into `flat` under its setting's name; it must be new and belong to its section."""
    key = name.replace("-", "_")
    if key in flat:
        raise ConfigError(f"'{key}' is given twice in {path}; give it once.")
    owner = known_fields().get(_ALIASES.get(key, key))
    if section is not None and owner is not None and owner[0] != section:
        raise ConfigError(f"'{key}' in {path} belongs to section [{owner[0]}], not [{section}].")
    flat[key] = value


def _convert(raw_key: str, key: str, value: Any, owner: tuple[str, Field[Any]]) -> Any:
    section, _ = owner
    hint = typing.get_type_hints(_SECTIONS[section])[key]
    if key == "memory":
        if raw_key == "gpu_memory_utilization":
            return parse_utilization(value)
        return value if isinstance(value, MemoryRequest) else parse_memory(str(value))
    if key == "reserve_bytes":
        return _parse_reserve(value)
    if typing.get_origin(hint) is tuple:
        items = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        return tuple(_require_text(raw_key, item) for item in items)
    converted = _convert_scalar(raw_key, value, _choices(hint))
    if isinstance(converted, int) and not isinstance(converted, bool):
        _check_range(raw_key, key, converted)
    return converted


def _parse_reserve(value: Any) -> int:
    try:
        return parse_bytes(str(value))
    except ConfigError as error:
        raise ConfigError(f"--reserve: {error}") from None


def _require_text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{_flag(key)} must be a text, not {value!r}.")
    if not value.strip():
        raise ConfigError(f"{_flag(key)} must not be empty.")
    return value


def _check_range(raw_key: str, key: str, value: int) -> None:
    if (key in _POSITIVE and value <= 0) or (key == "max_model_len" and value < 2):
        least = 2 if key == "max_model_len" else 1
        raise ConfigError(f"{_flag(raw_key)} {value} must be at least {least}.")
    if key == "block_size" and value & (value - 1):
        raise ConfigError(f"{_flag(raw_key)} {value} must be a power of two, for example 16.")
    if key == "port" and not 0 <= value <= 65535:
        raise ConfigError(f"{_flag(raw_key)} {value} is not a port; use 0 to 65535 (0 picks a free one).")
    if key in {"seed", "drain_seconds", "step_timeout_seconds"} and value < 0:
        raise ConfigError(f"{_flag(raw_key)} {value} must not be negative.")
    largest = _LARGEST_SEED if key == "seed" else _LARGEST_COUNT
    if value > largest and key != "max_body_bytes":
        raise ConfigError(f"{_flag(raw_key)} {value} is more than {largest}, the largest there is.")


def _choices(hint: Any) -> list[Any]:
    """The alternatives of a type hint, flattened: types and literal values."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return list(typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return [choice for part in typing.get_args(hint) for choice in _choices(part)]
    return [hint]


def _convert_scalar(key: str, value: Any, choices: list[Any]) -> Any:
    literals = [c for c in choices if isinstance(c, str)]
    if isinstance(value, str):
        matches = [c for c in literals if c.lower() == value.lower()]
        if matches:
            return matches[0]
    if bool in choices:
        return _parse_bool(key, value)
    if int in choices:
        return _parse_int(key, value, literals)
    if literals:
        raise ConfigError(f"{_flag(key)} '{value}' is not one of {', '.join(literals)}{nearest_hint(str(value), literals)}")
    return _require_text(key, value)


def _parse_bool(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in {"1", "true", "yes", "on"}:
        return True
    if word in {"0", "false", "no", "off"}:
        return False
    raise ConfigError(f"{_flag(key)} '{value}' is neither true nor false.")


def _parse_int(key: str, value: Any, literals: list[str]) -> int:
    try:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError
        return int(value)
    except (ValueError, TypeError, OverflowError):
        extra = f" or {', '.join(literals)}" if literals else ""
        raise ConfigError(f"{_flag(key)} '{value}' must be a whole number{extra}.") from None


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")
