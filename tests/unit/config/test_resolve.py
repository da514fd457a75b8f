"""Flags, environment and file into one configuration."""

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from brim.config.resolve import known_fields, nearest_hint, parse_memory, resolve
from brim.config.schema import BrimConfig, MemoryRequest
from brim.errors import ConfigError


def config_of(environment: dict[str, str] | None = None, file: str | None = None, **flags: Any) -> BrimConfig:
    return resolve({"model": "demo", **flags}, environment, file)


def write(folder: Path, text: str) -> str:
    path = folder / "brim.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("max", MemoryRequest("max")),
        (" Enough ", MemoryRequest("enough")),
        ("40GiB", MemoryRequest("bytes", num_bytes=40 << 30)),
        ("1", MemoryRequest("bytes", num_bytes=1)),
        ("85%", MemoryRequest("fraction", per_million=850_000)),
        ("85 %", MemoryRequest("fraction", per_million=850_000)),
        ("0.85", MemoryRequest("fraction", per_million=850_000)),
        (".5", MemoryRequest("fraction", per_million=500_000)),
        ("1.0", MemoryRequest("fraction", per_million=1_000_000)),
        ("33.3333%", MemoryRequest("fraction", per_million=333_333)),
    ],
)
def test_memory_is_read(text: str, request_: MemoryRequest) -> None:
    assert parse_memory(text) == request_


@pytest.mark.parametrize(
    "text",
    ["", "most", "0", "0GiB", "-1GiB", "0%", "-5%", "101%", "1.5", "inf%", "nan%", "1e400%", "nan", "40 apples", "%", "0.0"],
)
def test_memory_that_makes_no_sense_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory"):
        parse_memory(text)


@pytest.mark.parametrize("text", ["max", "enough", "4096MiB", "12345", "85%", "33.3333%"])
def test_a_memory_request_prints_as_it_is_read(text: str) -> None:
    assert parse_memory(str(parse_memory(text))) == parse_memory(text)


@pytest.mark.parametrize("value", ["1", 1, 1.0, "1.0"])
def test_a_utilization_of_one_is_the_whole_device_and_not_one_byte(value: Any) -> None:
    assert config_of(gpu_memory_utilization=value).memory.memory == MemoryRequest("fraction", per_million=1_000_000)


@pytest.mark.parametrize("value", ["85%", "max", "0", "1.1", "-0.5", "nan", "inf", 2, ""])
def test_a_utilization_is_a_fraction(value: Any) -> None:
    with pytest.raises(ConfigError, match="--gpu-memory-utilization"):
        config_of(gpu_memory_utilization=value)


def test_a_flag_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "[scheduler]\nmax_num_seqs = 1\n[server]\nport = 1\n[memory]\nblock-size = 32\n")
    config = config_of({"BRIM_PORT": "2", "BRIM_MAX_NUM_SEQS": "2"}, file, max_num_seqs="3")
    assert (config.scheduler.max_num_seqs, config.server.port, config.memory.block_size) == (3, 2, 32)
    names = ("max_num_seqs", "port", "block_size", "dtype")
    assert [config.sources[name] for name in names] == ["flag", "env BRIM_PORT", f"file {file}", "default"]


def test_every_value_has_a_source() -> None:
    assert set(config_of().sources) == set(known_fields())


def test_a_losing_source_is_checked_all_the_same() -> None:
    with pytest.raises(ConfigError, match="'many' must be a whole number"):
        config_of({"BRIM_MAX_NUM_SEQS": "many"}, max_num_seqs=3)


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        config_of().model.model = "another"  # type: ignore[misc]


def test_settings_may_stand_at_the_top_of_the_file(tmp_path: Path) -> None:
    config = resolve({}, {}, write(tmp_path, 'model = "demo"\nmax-model-len = "auto"\nmemory = "2GiB"\n'))
    assert (config.model.model, config.model.max_model_len, str(config.memory.memory)) == ("demo", "auto", "2048MiB")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[scheduler]\nmax_num_seq = 1", r"Unknown setting 'max_num_seq' .*did you mean 'max_num_seqs'"),
        ("[schedule]\nmax_num_seqs = 1", r"Unknown section \[schedule\].*did you mean 'scheduler'"),
        ("[memory]\nport = 1", r"'port' in .* belongs to section \[server\]"),
        ("[server]\nmax-body-bytes = 1\nmax_body_bytes = 2", "'max_body_bytes' is given twice"),
        ("port = [1]", "--port '\\[1\\]' must be a whole number"),
        ("[server]\nport = 1.5", "--port '1.5' must be a whole number"),
        ("dtype = 3", "--dtype '3' is not one of"),
        ("= 1", "not valid TOML"),
        ("[server]\napi_keys = ['a', 2]", "--api-keys must be a text"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(file=write(tmp_path, text))


def test_an_unreadable_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml cannot be read"):
        config_of(file=str(tmp_path / "missing.toml"))
    (tmp_path / "latin.toml").write_bytes(b'model = "\xff"')
    with pytest.raises(ConfigError, match="not valid TOML"):
        config_of(file=str(tmp_path / "latin.toml"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_num_seqs": 0}, "--max-num-seqs 0 must be at least 1"),
        ({"max_num_seqs": -3}, "--max-num-seqs -3 must be at least 1"),
        ({"max_num_seqs": "1.5"}, "must be a whole number"),
        ({"max_num_seqs": True}, "must be a whole number"),
        ({"max_num_seqs": float("inf")}, "must be a whole number"),
        ({"max_num_seqs": float("nan")}, "must be a whole number"),
        ({"max_num_seqs": 10**30}, "the largest there is"),
        ({"max_num_batched_tokens": 0}, "--max-num-batched-tokens 0 must be at least 1"),
        ({"max_model_len": 1}, "--max-model-len 1 must be at least 2"),
        ({"max_model_len": "longest"}, "whole number or auto"),
        ({"block_size": 24}, "power of two"),
        ({"port": 65536}, "is not a port"),
        ({"port": -1}, "is not a port"),
        ({"seed": -1}, "must not be negative"),
        ({"drain_seconds": -1}, "must not be negative"),
        ({"num_threads": 0}, "must be at least 1"),
        ({"reserve": "-1GiB"}, "--reserve: '-1GiB' is not a size"),
        ({"reserve_bytes": -1}, "--reserve: '-1' is not a size"),
        ({"dtype": "bfloat61"}, "is not one of .*did you mean 'bfloat16'"),
        ({"enforce_eager": "perhaps"}, "neither true nor false"),
        ({"max_num_sequences": 1}, "Unknown setting 'max_num_sequences' .flag.; did you mean 'max_num_seqs'"),
        ({"gpu_memory_utilisation": 1}, "did you mean 'gpu_memory_utilization'"),
        ({"memory": "1GiB", "gpu_memory_utilization": "0.5"}, "--memory and --gpu-memory-utilization .* give only one"),
        ({"api_key": ""}, "--api-key must not be empty"),
        ({"model": ""}, "--model must not be empty"),
        ({"host": " "}, "--host must not be empty"),
        ({"tokenizer": 5}, "--tokenizer must be a text"),
    ],
)
def test_a_bad_flag_is_refused_by_name(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(**flags)


def test_no_model_says_what_may_be_given() -> None:
    with pytest.raises(ConfigError, match="'demo'"):
        resolve({"model": None}, {})


def test_an_unknown_variable_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="BRIM_MAX_NUM_SEQ; did you mean 'max_num_seqs'"):
        config_of({"BRIM_MAX_NUM_SEQ": "1"})


def test_variables_of_others_and_empty_ones_are_left_alone() -> None:
    config = config_of({"PATH": "/bin", "BRIM_CACHE_DIR": "/c", "BRIM_CONFIG": "/f", "BRIM_PORT": "", "BRIM_API_KEY": ""})
    assert (config.server.port, config.server.api_keys) == (8000, ())


def test_texts_become_values() -> None:
    config = config_of(
        {"BRIM_API_KEY": "secret"},
        enforce_eager="yes",
        enable_prefix_caching="off",
        dtype="BFloat16",
        served_model_name=["a", "b"],
    )
    assert config.device.enforce_eager is True
    assert config.memory.enable_prefix_caching is False
    assert config.model.dtype == "bfloat16"
    assert config.model.served_model_name == ("a", "b")
    assert (config.server.api_keys, config.sources["api_keys"]) == (("secret",), "env BRIM_API_KEY")


def test_the_hint_names_the_nearest_or_nothing() -> None:
    assert nearest_hint("prot", ["port", "host"]) == "; did you mean 'port'?"
    assert nearest_hint("zzz", ["port", "host"]) == "."
