"""Steps that may kill their process: whatever becomes of one, the others get their turn."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from brim.engine.trials import TrialEnd, TrialStep, run_trials

CHILD = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from brim.engine.trials import ChildEnds, StopTrials, TrialStep, answer_trials

task = json.loads(sys.argv[1])

def attempt(name):
    with Path(task["log"]).open("a") as log:
        log.write(f"{os.getpid()} {name}\\n")
    if name == "exits":
        print("last words", file=sys.stderr)
        os._exit(7)
    if name == "killed":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "hangs":
        subprocess.Popen([sys.executable, "-c", f"import time, pathlib; time.sleep(2); pathlib.Path({task['log']!r}).unlink()"])
        time.sleep(60)
    if name == "prints":
        print("noise on stdout", flush=True)
        os.system("echo more noise")
    if name == "lost":
        raise ChildEnds({"said": "lost"})
    if name == "stops":
        raise StopTrials("nothing more to try")
    return {"said": name}

def begin():
    if task.get("broken") and len(task["done"]) >= task["broken"] - 1:
        raise StopTrials("no device")
    if task.get("dies"):
        os._exit(3)
    return attempt

answer_trials([TrialStep(name, 1.0, {"fact": name}) for name in task["names"]], task["done"], begin)
"""


def ends_of(log: Path, *names: str, **task: Any) -> dict[str, TrialEnd]:
    command = [sys.executable, "-c", CHILD]
    ends = list(run_trials(command, {"names": names, "log": str(log), **task}, start_timeout_s=60))
    assert [end.step.name for end in ends] == list(names), "every step ends once, in order"
    return {end.step.name: end for end in ends}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def processes(log: Path) -> list[str]:
    return [line.split()[0] for line in log.read_text().splitlines()]


def test_steps_that_answer_share_one_process(log: Path) -> None:
    ends = ends_of(log, "a", "prints", "b")
    assert {name: end.value for name, end in ends.items()} == {name: {"said": name} for name in ("a", "prints", "b")}
    assert len(set(processes(log))) == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [("exits", "ended with exit code 7: last words"), ("killed", "signal SIGSEGV: Fatal Python error: Segmentation fault")],
)
def test_a_step_that_kills_is_one_finding(log: Path, name: str, words: str) -> None:
    ends = ends_of(log, "a", name, "b")
    assert ends[name].value is None
    assert ends[name].tried
    assert words in ends[name].why
    assert ends[name].step == TrialStep(name, 1.0, {"fact": name})
    assert ends["b"].value == {"said": "b"}
    first, second, third = processes(log)
    assert first == second != third


def test_a_step_that_hangs_is_killed_with_all_it_started(log: Path) -> None:
    started = time.monotonic()
    ends = ends_of(log, "hangs", "b")
    assert "said nothing for 1 s and was killed" in ends["hangs"].why
    assert ends["b"].value == {"said": "b"}
    time.sleep(max(0.0, started + 3.5 - time.monotonic()))
    assert log.exists(), "the grandchild lived on"


def test_after_a_lost_device_a_new_process_goes_on(log: Path) -> None:
    ends = ends_of(log, "lost", "b")
    assert ends["lost"].value == {"said": "lost"}
    assert ends["b"].value == {"said": "b"}
    assert len(set(processes(log))) == 2


def test_a_child_that_stops_leaves_the_rest_untried(log: Path) -> None:
    ends = ends_of(log, "a", "stops", "b")
    assert ends["a"].value == {"said": "a"}
    assert [(ends[name].tried, ends[name].why) for name in ("stops", "b")] == [(False, "nothing more to try")] * 2


@pytest.mark.parametrize(("task", "words"), [({"broken": 1}, "no device"), ({"dies": True}, "ended with exit code 3")])
def test_a_child_that_cannot_begin_leaves_all_untried(log: Path, task: dict[str, Any], words: str) -> None:
    ends = ends_of(log, "a", "b", **task)
    assert all(not end.tried and words in end.why for end in ends.values())


def test_a_second_child_that_cannot_begin_leaves_the_rest_untried(log: Path) -> None:
    ends = ends_of(log, "a", "exits", "b", broken=3)
    assert ends["a"].value is not None
    assert ends["exits"].tried
    assert (ends["b"].tried, ends["b"].why) == (False, "no device")


def test_a_program_that_is_no_child_is_said(log: Path) -> None:
    (end,) = run_trials([sys.executable, "-c", "import sys; sys.exit('no such module')"], {})
    assert (end.tried, end.step.name) == (False, "start")
    assert "no such module" in end.why


def test_whoever_stops_listening_leaves_no_process(log: Path) -> None:
    ends = run_trials([sys.executable, "-c", CHILD], {"names": ["a", "hangs"], "log": str(log)})
    assert next(ends).value == {"said": "a"}
    ends.close()  # type: ignore[attr-defined]
    (pid,) = set(processes(log))
    time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
