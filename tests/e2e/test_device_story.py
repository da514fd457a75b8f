"""A device that is lost where a feature is used, end to end: served after one restart, and never tried again."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.scripted_engine_main import scripted_parts
from tests.e2e.test_restarts import Recorder, is_gone, serves, supervisor_of
from tests.small_models import write_small_model
from typer.testing import CliRunner

from brim.cli.main import app
from brim.config.avoid_record import list_records
from brim.config.resolve import resolve
from brim.errors import ConfigError
from brim.llm import LLM
from brim.runtime import build_engine_core

SCRIPTED = ("-m", "tests.e2e.scripted_engine_main")
SETTINGS = {"load_format": "dummy", "dtype": "float32", "max_model_len": 128, "max_num_seqs": 2, "max_num_batched_tokens": 32,
            "memory": "1200MiB"}  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def model(tmp_path: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small one; a cache of its own."""
    monkeypatch.setenv("BRIM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(short_folder))
    yield write_small_model(tmp_path / "model")


def device_with(fault: dict[str, str], model: Path, **settings: Any) -> Recorder:
    supervisor = supervisor_of(fault, SCRIPTED, **{**SETTINGS, "model": str(model), "step_timeout_seconds": 60, **settings})
    supervisor._silence = type(supervisor._silence)()  # a compiler takes its time
    return supervisor


async def start_and_serve(supervisor: Recorder) -> dict[str, Any]:
    try:
        info = await supervisor.start()
        await serves(supervisor)
        return info
    finally:
        await supervisor.close()
        assert all(is_gone(pid) for pid in supervisor.pids)


def test_capture_loses_the_device(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """torch.compile on, graphs asked for: served after one restart; the next start, and one in this process, do not try."""
    fault = {"phase": "capture", "how": "lost"}
    first = device_with(fault, model, compile=True, graph_mode="FULL_DECODE_ONLY")
    info = asyncio.run(start_and_serve(first))
    reason = "the engine died while capturing graphs (The scripted device was lost)"
    assert len(first.pids) == 2
    assert (info["graph_mode"], info["graph_mode_reason"], info["decode_programs"]) == ("NONE", f"avoided: {reason}", 0)
    assert info["compile"].startswith("on")
    assert info["avoided"] == [{"feature": "graphs", "most": "NONE", "reason": reason}]
    certificate = json.loads(Path(info["certificate"]).read_text())
    assert certificate["avoided"] == info["avoided"]
    assert certificate["settings"]["graph_mode"] == {"value": "NONE", "source": f"avoided: {reason}"}
    line = (
        "brim: The engine died while capturing graphs (The scripted device was lost); starting again without graphs. "
        "--strict refuses instead; brim doctor --forget clears it."
    )
    assert line in capfd.readouterr().err.splitlines()

    second = device_with(fault, model, compile=True, graph_mode="FULL_DECODE_ONLY")
    info = asyncio.run(start_and_serve(second))
    assert (len(second.pids), info["graph_mode"], info["avoided"][0]["reason"]) == (1, "NONE", reason)
    assert f"brim: Starting without graphs: in an earlier start {reason}." in capfd.readouterr().err

    config = resolve({**SETTINGS, "model": str(model)})
    core, info = build_engine_core(config, lambda _: None, parts=scripted_parts(fault))
    core.close()
    assert (info["graph_mode"], len(info["avoided"])) == ("NONE", 1)
    strict = resolve({**SETTINGS, "model": str(model), "strict": True})
    with pytest.raises(ConfigError, match="--strict refuses to start without graphs"):
        build_engine_core(strict, lambda _: None, parts=scripted_parts(fault))
    forgotten = CliRunner().invoke(app, ["doctor", "--forget"])
    assert (forgotten.exit_code, list_records()) == (0, [])
    assert "1 record" in forgotten.stdout


@pytest.mark.parametrize(("phase", "feature"), [("reserve", "virtual_memory"), ("warm", "compile")])
def test_what_ends_the_process_elsewhere(phase: str, feature: str, model: Path) -> None:
    supervisor = device_with({"phase": phase, "how": "abort"}, model, compile=phase == "warm")
    info = asyncio.run(start_and_serve(supervisor))
    assert len(supervisor.pids) == 2
    assert [(one["feature"], one["most"]) for one in info["avoided"]] == [(feature, "off")]
    assert "SIGABRT" in info["avoided"][0]["reason"]
    assert phase != "warm" or info["compile"].startswith("off: avoided: the engine died while running its first steps")


def test_in_one_process_the_error_names_what_to_try(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from brim import llm as llm_module
    from brim.errors import DeviceLost

    parts = scripted_parts({"phase": "capture", "how": "lost"})
    monkeypatch.setattr(
        llm_module, "build_engine_core", lambda config, said, meanwhile: build_engine_core(config, said, meanwhile, parts)
    )
    with pytest.raises(DeviceLost, match=r"was lost\. It happened while capturing graphs; try --graph-mode NONE\."):
        LLM(str(model), **SETTINGS)
