"""The conformance checks of a platform, and the process that runs them for `brim doctor`. Owns their list, their order and what
becomes of one that fails; not the checks (`memory_checks`, `graph_checks`, `compute_checks`) and no verb."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from brim.config.resolve import resolve
from brim.config.schema import BrimConfig
from brim.engine.trials import ChildEnds, StopTrials, TrialStep, answer_trials
from brim.errors import BrimError, DeviceLost, first_line
from brim.platforms.base import Platform
from brim.platforms.detect import detect
from brim.worker import compute_checks, graph_checks, memory_checks
from brim.worker.check_bench import Bench, CheckFailed, Figures, Found, NotSupported, NotTried, Outcome
from brim.worker.start_preview import preview_caps, preview_start

_COMPILING_S = 60.0  # kernels are compiled at their first call
_DOWNLOADING_S = 1800.0  # a hub model's files
_NO_MODEL = "none"


@dataclass(frozen=True, slots=True)
class Check:
    """One check. capability: what the platform declares that this tries. workaround: flags that start without it."""

    name: str
    did: str
    run: Callable[[Bench], Found]
    capability: str = ""
    workaround: str = ""
    timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What one check found. note: what there is to say of one that passed; reason: why it did not pass."""

    name: str
    did: str
    outcome: Outcome
    reason: str = ""
    note: str = ""
    figures: Figures = field(default_factory=dict)
    seconds: float = 0.0
    capability: str = ""
    workaround: str = ""


_SIZE = "--memory SIZE with room to spare"
_MARGIN = "--reserve SIZE, for what is not seen"
_STATIC = "--arena static"
_EAGER = "--enforce-eager"
_TORCH = "--kernels torch"
# The cap comes last: there may be no way back from it.
CHECKS: tuple[Check, ...] = (
    Check("readings_sane", "read total, free, ours and others", memory_checks.readings_sane, "trusted_readings", _SIZE),
    Check("readings_move", "take memory, read, give it back, read", memory_checks.readings_move, "trusted_readings", _SIZE),
    Check("copies", "copy to the device and back", compute_checks.copies),
    Check("dtypes", "multiply in each declared dtype", compute_checks.dtypes, "dtypes", "--dtype with one that works"),
    Check("arena", "reserve, commit, write, uncommit, commit again", memory_checks.arena, "reserve_commit", _STATIC),
    Check("arena_readings", "read while an arena grows and shrinks", memory_checks.arena_readings, "trusted_readings", _SIZE),
    Check("commit_later", "write to pages committed after their view", memory_checks.commit_later, "reserve_commit", _STATIC),
    Check("peak", "take and give back, then ask for the peak", memory_checks.peak, "resettable_peak", _MARGIN),
    Check("errors", "ask for too much, and see what the error is", memory_checks.errors),
    Check("graph", "capture x + 1 and replay it", graph_checks.graph, "graphs", _EAGER),
    Check("graph_commit_later", "replay onto pages committed after the capture", graph_checks.graph_commit_later, "graphs",
          f"{_STATIC}, else {_EAGER}"),
    Check("kernels", "choose kernels", compute_checks.kernels, "", _TORCH, _COMPILING_S),
    Check("kernel_rms_norm", "rms_norm against the reference", compute_checks.kernel_rms_norm, "", _TORCH, _COMPILING_S),
    Check("kernel_linear", "linear against the reference", compute_checks.kernel_linear, "", _TORCH, _COMPILING_S),
    Check("kernel_attention", "attention against the reference", compute_checks.kernel_attention, "", _TORCH, _COMPILING_S),
    Check("kernel_sample", "sampling against the reference", compute_checks.kernel_sample, "", _TORCH, _COMPILING_S),
    Check("graph_kernels", "capture a kernel and replay it", graph_checks.graph_kernels, "graphs", _EAGER),
    Check("cap", "set a cap and ask for more", memory_checks.cap, "cap_enforced", _MARGIN),
)  # fmt: skip


def run_check(check: Check, bench: Bench) -> CheckResult:
    """Run one check; whatever it ends with becomes its result."""
    started = time.perf_counter()
    outcome: Outcome = "passed"
    reason, found = "", Found()
    try:
        with bench.platform.stream():
            bench.settle()
            found = check.run(bench)
            bench.settle()
    except NotSupported as why:
        outcome, reason, found = "not_supported", str(why), Found(why.figures)
    except NotTried as why:
        outcome, reason = "not_tried", str(why)
    except CheckFailed as why:
        outcome, reason, found = "failed", str(why), Found(why.figures)
    except Exception as error:  # any failure is a finding
        outcome, reason = "failed", _in_words(_known(error, bench))
    return CheckResult(
        name=check.name,
        did=check.did,
        outcome=outcome,
        reason=reason,
        note=found.note,
        figures={key: _plain(value) for key, value in found.figures.items()},
        seconds=round(time.perf_counter() - started, 4),
        capability=check.capability,
        workaround=check.workaround if outcome == "failed" else "",
    )


def _plain(value: float | str) -> float | str:
    """A figure that JSON can hold: what is not a number is a text."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value


def _known(error: Exception, bench: Bench) -> Exception:
    """The error as the platform understands it."""
    try:
        return bench.platform.as_brim_error(error) or error
    except Exception:
        return error


def _in_words(error: BaseException) -> str:
    first = first_line(error)[:240]
    return first if isinstance(error, BrimError) else f"{type(error).__name__}: {first}"


def run_checks(bench: Bench) -> list[CheckResult]:
    """All checks in this process, for a platform that is known not to kill it."""
    return [run_check(check, bench) for check in CHECKS]


def is_usable(bench: Bench) -> bool:
    """Whether this process can still compute on the device after a check failed."""
    try:
        with bench.platform.stream():
            alive = float(torch.ones(16, device=bench.device).sum()) == 16.0
            bench.platform.synchronize()
            bench.platform.reading()
    except DeviceLost:
        return False
    except BrimError:  # it says what is wrong and still answers
        return True
    except Exception:
        return False
    return alive


class ConformanceChild:
    """The steps of the process: describe the platform, read it, say what start-up would do, then the checks."""

    def __init__(self, task: dict[str, Any]) -> None:
        self._has_model = task["model"] is not None
        flags = {"model": task["model"] or _NO_MODEL, **task["settings"]}
        self._config = resolve(flags, task["environment"], task["config_file"])
        self._with_start = bool(task.get("with_start", True))
        self._opened: Bench | None = None

    def steps(self) -> list[TrialStep]:
        """In order; a check's facts are its result, should the process not live to give it."""
        first = [TrialStep("machine"), TrialStep("readings")]
        if self._with_start:
            first.append(TrialStep("start", _DOWNLOADING_S if self._has_model else _COMPILING_S))
        return first + [TrialStep(check.name, check.timeout_s, asdict(_unanswered(check))) for check in CHECKS]

    def begin(self) -> Callable[[str], dict[str, Any]]:
        """Open the platform. Raises StopTrials where that fails."""
        try:
            platform = open_platform(self._config)
        except Exception as error:
            raise StopTrials(_in_words(error)) from error
        self._opened = Bench(platform, self._config)
        return self.attempt

    def attempt(self, name: str) -> dict[str, Any]:
        """One step. A check that leaves the device lost ends this process, so that a new one goes on."""
        bench = self._opened
        assert bench is not None, "begin() opens the platform"
        platform, config = bench.platform, bench.config
        if name == "machine":
            return describe_machine(platform)
        if name == "readings":
            defaults = platform.default_limits()
            given = config.memory.reserve_bytes
            reserve = {"reserve_bytes": defaults.reserve_bytes if given is None else given, "default_memory": defaults.memory}
            return asdict(platform.reading()) | reserve | {"caps": preview_caps(config, platform)}
        if name == "start":
            with platform.stream():
                return preview_start(config, platform, has_model=self._has_model)
        result = asdict(run_check(next(check for check in CHECKS if check.name == name), bench))
        if result["outcome"] == "failed" and not is_usable(bench):
            raise ChildEnds(result)
        return result


def _unanswered(check: Check) -> CheckResult:
    return CheckResult(check.name, check.did, "failed", capability=check.capability, workaround=check.workaround)


def open_platform(config: BrimConfig) -> Platform:
    """The platform the settings name, without what they switch off."""
    platform = detect(config.device.device)
    if config.device.arena == "static":
        platform.restrict(reserve_commit=False, arena_backend="static")
    if config.device.enforce_eager:
        platform.restrict(graphs=False, graph_modes=("NONE",))
    return platform


def describe_machine(platform: Platform) -> dict[str, Any]:
    """The chosen platform by its own account, and versions."""
    versions = {"python": sys.version.split()[0]}
    for package in ("brim", "torch", "triton", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    plain = (int, float, bool)
    described = {key: value if isinstance(value, plain) else str(value) for key, value in platform.describe().items()}
    return {"platform": platform.name, "describe": described, "capabilities": asdict(platform.capabilities), "versions": versions}


def main() -> int:
    """Run what the task asks for and is not done yet; see `engine.trials` for the stream."""
    task = json.loads(sys.argv[1])
    child = ConformanceChild(task)
    answer_trials(child.steps(), task["done"], child.begin)
    return 0


if __name__ == "__main__":
    sys.exit(main())
