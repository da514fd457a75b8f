"""The command as a whole: instant help, usage errors, no tracebacks."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest
from tests.unit.cli.conftest import Brim, FakeLLM

from brim.cli.main import main
from brim.errors import BrokenModel, MemoryBudgetError
from brim.memory.ledger import Ledger


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from brim.cli.main import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'fastapi', 'transformers', 'numpy', 'uvicorn', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=dict(os.environ))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "Usage: brim" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("verb", ["run", "serve", "ps", "version", "bench"])
def test_every_verb_is_listed_and_has_help(brim_command: Brim, verb: str) -> None:
    assert f"  {verb} " in brim_command("--help").out
    ended = brim_command(verb, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert f"Usage: brim {verb}" in ended.out


def test_version(brim_command: Brim) -> None:
    assert brim_command("version").out.startswith("brim 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        ("run",),
        ("walk",),
        ("run", "demo", "hi", "--max-num-seq", "1"),
        ("run", "demo", "hi", "--max-tokens", "x"),
        ("bench", "decode"),
    ],
)
def test_wrong_usage_exits_with_2(brim_command: Brim, arguments: tuple[str, ...]) -> None:
    ended = brim_command(*arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert "Usage: brim" in ended.err


def test_a_near_flag_is_named(brim_command: Brim) -> None:
    assert "--max-num-seqs" in brim_command("run", "demo", "hi", "--max-num-seq", "1").err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("run", "demo", "hi", "--max-num-seqs", "0"), "brim: --max-num-seqs 0 must be at least 1.\n"),
        (("serve", "demo", "--port", "99999"), "brim: --port 99999 is not a port; use 0 to 65535 (0 picks a free one).\n"),
        (("run", "demo", "hi", "--temperature", "-1"), "brim: temperature must be at least 0 and at most 100, not -1.0.\n"),
        (("run", "demo", "hi", "--max-tokens", "0"), "brim: max_tokens must be a whole number from 1 to 1073741824, not 0.\n"),
        (("serve",), "brim: No model was named; give a local folder, a .gguf file, a hub id, or 'demo'.\n"),
        (("bench", "decode", "--model", "demo", "--dtype", "int3"), "brim: --dtype 'int3' is not one of"),
        (("run", "demo", "hi", "--config", "/missing.toml"), "brim: The configuration file /missing.toml cannot be read"),
    ],
)
def test_a_wrong_setting_is_one_sentence_and_exit_1(
    brim_command: Brim, fake_llm: FakeLLM, arguments: tuple[str, ...], sentence: str
) -> None:
    ended = brim_command(*arguments)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith(sentence)
    assert ended.err.count("\n") == 1


def test_an_error_of_the_model_is_one_sentence(brim_command: Brim, fake_llm: FakeLLM) -> None:
    fake_llm.failure = BrokenModel("The file is truncated.")
    ended = brim_command("run", "demo", "hi", "--no-stream")
    assert (ended.code, ended.out, ended.err) == (1, "", "brim: The file is truncated.\n")


def test_a_memory_error_brings_its_ledger_as_a_table(brim_command: Brim, fake_llm: FakeLLM) -> None:
    ledger = (
        Ledger(1 << 30, 4 << 30).with_line("weights", "model", 3 << 30, "computed").with_line("free", "device", 7, "measured")
    )
    fake_llm.failure = MemoryBudgetError("It does not fit under 1 GiB.", ledger=ledger, nearest=["--memory 4GiB"])
    ended = brim_command("run", "demo", "hi", "--no-stream")
    lines = ended.err.splitlines()
    assert ended.code == 1
    assert lines[0] == "brim: It does not fit under 1 GiB. Settings that would fit: --memory 4GiB."
    assert lines[1].split() == ["category", "owner", "bytes", "known", "by"]
    assert lines[3].split() == ["weights", "model", "3.00", "GiB", "computed"]
    assert any(line.startswith("OVER THE CAP") for line in lines)


def test_a_bug_of_ours_is_a_sentence_too_and_a_traceback_only_on_demand(brim_command: Brim, fake_llm: FakeLLM) -> None:
    fake_llm.failure = KeyError("oops")
    ended = brim_command("run", "demo", "hi", "--no-stream")
    assert ended.code == 1
    assert "internal error" in ended.err
    assert "KeyError" in ended.err
    assert "Traceback" not in ended.err
    with pytest.raises(KeyError):
        brim_command("--debug", "run", "demo", "hi", "--no-stream")


def test_ctrl_c_ends_with_130_and_says_nothing(brim_command: Brim, fake_llm: FakeLLM) -> None:
    fake_llm.failure = KeyboardInterrupt()
    ended = brim_command("run", "demo", "hi", "--no-stream")
    assert (ended.code, ended.err) == (130, "")
    assert fake_llm.closed


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "brim", "version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert callable(main)
