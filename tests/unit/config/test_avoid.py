"""What is taken away after a death, what that does to a configuration, and the files that remember it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from brim.config.avoid import (
    SUSPECTS,
    StartUses,
    apply_avoided,
    apply_recorded,
    flag_for,
    merge,
    next_avoided,
    said_of_death,
    said_of_record,
)
from brim.config.avoid_record import forget_records, identity_of, list_records, read_record, write_record
from brim.config.resolve import resolve
from brim.config.schema import Avoided, BrimConfig, GraphMode, ModelConfig
from brim.errors import ConfigError

MODES = get_args(GraphMode)
ALL = StartUses(graph_mode="FULL_AND_PIECEWISE", graph_modes=MODES, compile=True, virtual_memory=True, vendor_kernels=True)
NOTHING = StartUses()


def using(**changes: Any) -> StartUses:
    return replace(ALL, **changes)


@pytest.mark.parametrize(
    ("phase", "uses", "taken"),
    [
        ("capture", ALL, ("graphs", "PIECEWISE")),
        ("capture", using(graph_mode="FULL"), ("graphs", "PIECEWISE")),
        ("capture", using(graph_mode="FULL_DECODE_ONLY"), ("graphs", "PIECEWISE")),
        ("capture", using(graph_mode="FULL_DECODE_ONLY", graph_modes=("NONE", "FULL_DECODE_ONLY")), ("graphs", "NONE")),
        ("capture", using(graph_mode="PIECEWISE"), ("graphs", "NONE")),
        ("capture", using(graph_mode="NONE"), None),
        ("warm", ALL, ("compile", "off")),
        ("warm", using(compile=False), ("vendor_kernels", "off")),
        ("warm", using(compile=False, vendor_kernels=False), ("virtual_memory", "off")),
        ("measure", using(compile=False), ("vendor_kernels", "off")),
        ("reserve", ALL, ("virtual_memory", "off")),
        ("reserve", using(virtual_memory=False), None),
        ("commit", ALL, ("virtual_memory", "off")),
        ("commit", using(virtual_memory=False), ("graphs", "PIECEWISE")),
        ("prove", using(virtual_memory=False, graph_mode="NONE"), ("compile", "off")),
        ("open", ALL, ("compile", "off")),
        ("load", ALL, None),
        ("", ALL, None),
        *((phase, NOTHING, None) for phase in SUSPECTS),
    ],
)
def test_the_phase_that_died_decides_what_is_taken_away(phase: str, uses: StartUses, taken: tuple[str, str] | None) -> None:
    found = next_avoided(phase, uses, "SIGABRT")
    assert (None if found is None else (found.feature, found.most)) == taken


@pytest.mark.parametrize("phase", SUSPECTS)
def test_nothing_is_taken_twice_and_there_is_an_end(phase: str) -> None:
    uses, num_starts = ALL, 0
    while (found := next_avoided(phase, uses, "SIGABRT")) is not None:
        num_starts += 1
        lower: Any = {"graph_mode": found.most} if found.feature == "graphs" else {found.feature: False}
        uses = replace(uses, **lower)
    assert num_starts <= 5


def config_of(**settings: Any) -> BrimConfig:
    return resolve({"model": "demo", **settings})


def death(feature: str, most: str = "off") -> Avoided:
    return Avoided(feature, most, "the engine died while testing (SIGABRT)")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "avoided", "field", "value"),
    [
        ({}, death("graphs", "PIECEWISE"), "graph_mode", "PIECEWISE"),
        ({"graph_mode": "FULL"}, death("graphs", "PIECEWISE"), "graph_mode", "PIECEWISE"),
        ({"graph_mode": "PIECEWISE"}, death("graphs", "NONE"), "graph_mode", "NONE"),
        ({"compile": True}, death("compile"), "compile", False),
        ({}, death("virtual_memory"), "arena", "static"),
        ({"kernels": "triton"}, death("vendor_kernels"), "kernels", "torch"),
    ],
)
def test_a_feature_is_taken_away_even_where_it_was_asked_for(
    settings: dict[str, Any], avoided: Avoided, field: str, value: object
) -> None:
    config = apply_avoided(config_of(**settings), [avoided])
    assert getattr(config.device, field) == value
    assert config.sources[field] == "avoided: the engine died while testing (SIGABRT)"
    assert config.avoided == (avoided,)
    with pytest.raises(ConfigError, match=r"--strict refuses to start with.*died while testing.*brim doctor --forget"):
        apply_recorded(config_of(**settings, strict=True), [avoided])


@pytest.mark.parametrize(
    ("settings", "avoided"),
    [
        ({"graph_mode": "NONE"}, death("graphs", "NONE")),
        ({"graph_mode": "PIECEWISE"}, death("graphs", "PIECEWISE")),
        ({"enforce_eager": True}, death("graphs", "NONE")),
        ({}, death("compile")),
        ({"arena": "static"}, death("virtual_memory")),
        ({"kernels": "torch"}, death("vendor_kernels")),
    ],
)
def test_what_is_not_used_anyway_changes_nothing(settings: dict[str, Any], avoided: Avoided) -> None:
    config = config_of(**settings, strict=True)
    assert apply_recorded(config, [avoided]) is config


def test_of_two_steps_down_the_ladder_the_lower_stays() -> None:
    high, low = death("graphs", "PIECEWISE"), death("graphs", "NONE")
    assert merge([high], [low]) == merge([low], [high]) == (low,)
    config = apply_avoided(config_of(), [high, low])
    assert (config.device.graph_mode, config.avoided) == ("NONE", (low,))


def test_what_is_said() -> None:
    found = next_avoided("capture", using(graph_mode="PIECEWISE"), "SIGABRT")
    assert found is not None
    assert said_of_death(found) == (
        "The engine died while capturing graphs (SIGABRT); starting again without graphs. --strict refuses instead; "
        "brim doctor --forget clears it."
    )
    assert said_of_record([found, death("compile")]).startswith(
        "Starting without graphs and without torch.compile: in an earlier start the engine died while capturing graphs (SIGABRT);"
    )
    assert flag_for(found) == "--graph-mode NONE"


def test_a_record_is_for_one_platform_driver_version_and_model(tmp_path: Path) -> None:
    described = {"device": "a device", "driver": "1", "total_bytes": 5}
    versions = {"torch": "2.11", "brim": "0.1"}
    identity = identity_of("scripted", described, versions, ModelConfig(model="/models/ä b"))
    path = write_record(identity, (death("graphs", "PIECEWISE"),), tmp_path)
    assert path is not None and path.is_file()
    assert read_record(identity, tmp_path) == (death("graphs", "PIECEWISE"),)
    assert write_record(identity, (death("graphs", "NONE"), death("compile")), tmp_path) == path
    assert read_record(identity, tmp_path) == (death("graphs", "NONE"), death("compile"))
    for other in (
        identity_of("other", described, versions, ModelConfig(model="/models/ä b")),
        identity_of("scripted", {**described, "driver": "2"}, versions, ModelConfig(model="/models/ä b")),
        identity_of("scripted", described, {**versions, "torch": "2.12"}, ModelConfig(model="/models/ä b")),
        identity_of("scripted", described, versions, ModelConfig(model="b")),
        identity_of("scripted", described, versions, ModelConfig(model="/models/ä b", dtype="float32")),
    ):
        assert read_record(other, tmp_path) == ()
    ((listed, record),) = list_records(tmp_path)
    assert (listed, record.identity["device"], len(record.written)) == (path, "a device", 20)
    assert forget_records(tmp_path) == [path]
    assert list_records(tmp_path) == [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"identity": {}, "avoided": [{"feature": "luck"}]}', '{"format_version": 9}']
)
def test_a_file_that_cannot_be_read_is_as_good_as_none(tmp_path: Path, content: str) -> None:
    identity = {"platform": "p", "model": "m"}
    path = write_record(identity, (death("compile"),), tmp_path)
    assert path is not None
    path.write_text(content)
    assert read_record(identity, tmp_path) == ()
    assert list_records(tmp_path) == []
    assert forget_records(tmp_path) == [path]


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert write_record({"platform": "p"}, (death("compile"),), tmp_path / "file") is None
