"""Flags, environment and file become one frozen BrimConfig whose values keep their source.

Precedence: flag > environment (BRIM_<FIELD>) > file (TOML, `--config`) > default. Unknown keys are errors that name the
nearest known one. Owns parsing of setting texts; what a setting means is `schema`'s.
"""

from __future__ import annotations

import difflib
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
_POSITIVE = {
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "num_threads",
    "max_body_bytes",
}


def parse_memory(text: str) -> MemoryRequest:
    """`max`, `enough`, `40GiB`, `85%`, or vLLM's fraction `0.85`. Raises ConfigError with an example otherwise."""
    word = text.strip().lower()
    if word == "max":
        return MemoryRequest("max")
    if word == "enough":
        return MemoryRequest("enough")
    try:
        if word.endswith("%"):
            per_million = round(float(word[:-1]) * 10_000)
        elif "." in word and word.replace(".", "", 1).isdigit():
            per_million = round(float(word) * 1_000_000)
        else:
            num_bytes = parse_bytes(word)
            if num_bytes <= 0:
                raise ConfigError(f"--memory {text} is not more than zero; write for example --memory 40GiB.")
            return MemoryRequest("bytes", num_bytes=num_bytes)
    except ValueError:
        raise ConfigError(
            f"--memory '{text}' is not understood; write max, enough, a size such as 40GiB or a share such as 85%."
        ) from None
    if not 0 < per_million <= 1_000_000:
        raise ConfigError(f"--memory {text} must be more than 0 % and at most 100 % of the device.")
    return MemoryRequest("fraction", per_million=per_million)


def known_fields() -> dict[str, tuple[str, Field[Any]]]:
    """Field name -> (section name, dataclass field), for every setting."""
    return {f.name: (section, f) for section, cls in _SECTIONS.items() for f in fields(cls)}


def nearest_hint(key: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known key, or an empty string."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else "."


def resolve(flags: Mapping[str, Any], environment: Mapping[str, str] | None = None, config_file: str | None = None) -> BrimConfig:
    """The configuration from its sources. `flags` holds only what was given (None means not given).

    Raises ConfigError for unknown keys, wrong types and values out of range.
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
        for raw_key, value in layer.items():
            key = _ALIASES.get(raw_key, raw_key)
            if key not in known:
                raise ConfigError(f"Unknown setting '{raw_key}' ({source}){nearest_hint(raw_key, known)}")
            if key not in values:
                values[key] = _convert(raw_key, key, value, known[key])
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
    known = {*known_fields(), *_ALIASES}
    found = {}
    for name, value in environment.items():
        key = name.removeprefix("BRIM_").lower()
        if name.startswith("BRIM_") and key in known:
            found[key] = value
        elif name.startswith("BRIM_") and key not in {"config", "cache_dir"}:
            raise ConfigError(f"Unknown environment variable {name}{nearest_hint(key, known)}")
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
            flat.update(value)
        else:
            flat[key] = value
    return {key.replace("-", "_"): value for key, value in flat.items()}


def _convert(raw_key: str, key: str, value: Any, owner: tuple[str, Field[Any]]) -> Any:
    section, _ = owner
    hint = typing.get_type_hints(_SECTIONS[section])[key]
    if key == "memory":
        return value if isinstance(value, MemoryRequest) else parse_memory(str(value))
    if key == "reserve_bytes":
        return value if isinstance(value, int) and not isinstance(value, bool) else parse_bytes(str(value))
    if typing.get_origin(hint) is tuple:
        return tuple(value) if isinstance(value, (list, tuple)) else (str(value),)
    converted = _convert_scalar(raw_key, value, _choices(hint))
    if isinstance(converted, int) and not isinstance(converted, bool):
        _check_range(raw_key, key, converted)
    return converted


def _check_range(raw_key: str, key: str, value: int) -> None:
    if (key in _POSITIVE and value <= 0) or (key == "max_model_len" and value < 2):
        least = 2 if key == "max_model_len" else 1
        raise ConfigError(f"{_flag(raw_key)} {value} must be at least {least}.")
    if key == "block_size" and value & (value - 1):
        raise ConfigError(f"{_flag(raw_key)} {value} must be a power of two, for example 16.")
    if key == "port" and not 0 <= value <= 65535:
        raise ConfigError(f"{_flag(raw_key)} {value} is not a port; use 0 to 65535 (0 picks a free one).")
    if key in {"seed", "drain_seconds"} and value < 0:
        raise ConfigError(f"{_flag(raw_key)} {value} must not be negative.")


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
    if not isinstance(value, str):
        raise ConfigError(f"{_flag(key)} must be a text, not {value!r}.")
    return value


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
        if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
            raise ValueError
        return int(value)
    except (ValueError, TypeError):
        extra = f" or {', '.join(literals)}" if literals else ""
        raise ConfigError(f"{_flag(key)} '{value}' must be a whole number{extra}.") from None


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")
