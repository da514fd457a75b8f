"""The conformance checks: they pass a right platform and catch a wrong one, each for its own reason."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from brim.config.resolve import resolve
from brim.errors import BrimError, DeviceLost, OutOfDeviceMemory
from brim.platforms.base import DeviceGraph, MemoryReading
from brim.platforms.cpu import CpuPlatform
from brim.platforms.fake import FakeDevice, FakePlatform, Lie
from brim.units import GIB, MIB
from brim.worker.check_bench import Bench
from brim.worker.conformance import CHECKS, CheckResult, is_usable, run_check, run_checks

CONFIG = resolve({"model": "none"})


def result_of(name: str, platform: Any, **settings: Any) -> CheckResult:
    bench = Bench(platform, resolve({"model": "none", **settings}))
    try:
        return run_check(next(check for check in CHECKS if check.name == name), bench)
    finally:
        bench.close()


def fake(lie: Lie | None = None, *, declared: bool = True, **changes: Any) -> FakePlatform:
    """A scripted device; with declared=True it stands by its lies."""
    platform = FakePlatform(FakeDevice(), lie=lie)
    platform.restrict(**({"trusted_readings": True} if declared else {}), **changes)
    return platform


class Tape:
    """A graph of a host: the work, done again at each replay."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, float]] = []

    def replay(self) -> None:
        for numbers, amount in self.calls:
            torch.Tensor.add_(numbers, amount)


class GraphPlatform(FakePlatform):
    """Captures `add_` on host tensors: right as it is, wrong where a test scripts it. `runs_inside`: work runs during capture;
    `deaf`: replays do nothing the second time."""

    def __init__(self, *, runs_inside: bool = False, deaf: bool = False) -> None:
        super().__init__(FakeDevice())
        self.restrict(graphs=True, graph_modes=("NONE", "FULL_DECODE_ONLY"))
        self.runs_inside, self.deaf = runs_inside, deaf

    @contextlib.contextmanager
    def capture(self) -> Iterator[DeviceGraph]:
        tape, replay = Tape(), Tape.replay
        real = torch.Tensor.add_

        def add_(numbers: torch.Tensor, amount: float) -> torch.Tensor:
            tape.calls.append((numbers, amount))
            return real(numbers, amount) if self.runs_inside else numbers

        if self.deaf:
            tape.replay = lambda: (replay(tape), tape.calls.clear())  # type: ignore[method-assign, assignment]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "add_", add_)
            real_replay_add = real
            yield tape
        assert real_replay_add is torch.Tensor.add_


def test_this_machine_passes() -> None:
    bench = Bench(CpuPlatform(), CONFIG)
    results = run_checks(bench)
    bench.close()
    assert [result.name for result in results] == [check.name for check in CHECKS]
    assert {result.name: result.reason for result in results if result.outcome in ("failed", "not_tried")} == {}
    passed = {result.name for result in results if result.outcome == "passed"}
    assert passed >= {"readings_move", "arena", "commit_later", "peak", "errors", "cap", "kernel_attention", "kernel_sample"}
    assert next(r for r in results if r.name == "graph").outcome == "not_supported"


def test_the_scripted_device_passes() -> None:
    outcomes = {result.name: result.outcome for result in run_checks(Bench(fake(), CONFIG))}
    assert "failed" not in outcomes.values()
    assert outcomes["readings_move"] == outcomes["arena_readings"] == outcomes["peak"] == outcomes["cap"] == "passed"


def test_memory_comes_back_after_every_check() -> None:
    platform = fake()
    before = platform.device.ours_bytes
    run_checks(Bench(platform, CONFIG))
    assert (platform.device.ours_bytes, platform.arena_bytes) == (before, 0)


FROZEN = MemoryReading(total_bytes=16 * GIB, free_bytes=15 * GIB, ours_bytes=GIB, others_bytes=0, limit_source="device")
LIES: dict[str, tuple[Lie, str, str]] = {
    "frozen": (lambda true: FROZEN, "readings_move", "ours moved by 0 B"),
    "frozen, seen by an arena": (lambda true: FROZEN, "arena_readings", "instead of"),
    "negative": (lambda true: replace(true, free_bytes=-1), "readings_sane", "free_bytes is -1"),
    "more free than there is": (lambda true: replace(true, free_bytes=17 * GIB), "readings_sane", "17.00 GiB are free of 16.00"),
    "larger than the slice": (
        lambda true: replace(true, total_bytes=141 * GIB, free_bytes=true.free_bytes + 125 * GIB),
        "readings_sane",
        "describe says 16.00 GiB",
    ),
    "others made up": (lambda true: replace(true, others_bytes=9 * GIB), "readings_sane", "others hold 9.00 GiB"),
    "free stays where it is": (
        lambda true: replace(true, free_bytes=15 * GIB, others_bytes=max(0, GIB - true.ours_bytes)),
        "readings_move",
        "free fell by 0 B",
    ),
}


@pytest.mark.parametrize("case", LIES, ids=str)
def test_a_lying_reading_is_caught(case: str) -> None:
    lie, check, words = LIES[case]
    found = result_of(check, fake(lie))
    assert (found.outcome, found.capability) == ("failed", "trusted_readings")
    assert words in found.reason
    assert "--memory" in found.workaround


@pytest.mark.parametrize("case", LIES, ids=str)
def test_a_platform_that_owns_up_to_its_lies_is_right(case: str) -> None:
    lie, check, words = LIES[case]
    found = result_of(check, fake(lie, declared=False))
    assert found.outcome == "not_supported"
    assert words in found.reason


def test_a_host_whose_readings_stand_still_is_caught() -> None:
    class Still(CpuPlatform):
        def reading(self) -> MemoryReading:
            return replace(FROZEN, total_bytes=8 * GIB, free_bytes=GIB)

    found = result_of("readings_move", Still())
    assert found.outcome == "failed"
    assert "ours moved by 0 B" in found.reason


def test_nothing_is_taken_where_little_is_free() -> None:
    platform = FakePlatform(FakeDevice(neighbours={"other": 16 * GIB - 320 * MIB}))
    found = result_of("readings_move", platform)
    assert found.outcome == "not_tried"
    assert "free some memory" in found.reason


def test_nothing_is_taken_where_free_is_unknown_and_too_much_kills() -> None:
    platform = FakePlatform(FakeDevice(over_allocation_loses=True), lie=lambda true: replace(true, trusted=False, reason="stale"))
    assert result_of("peak", platform).outcome == "not_tried"
    assert result_of("cap", platform).outcome == "not_tried"
    assert not platform.device.lost


def test_without_reserve_and_commit_the_static_arena_is_checked() -> None:
    platform = FakePlatform(FakeDevice(), reserve_commit=False)
    outcomes = {result.name: result for result in run_checks(Bench(platform, CONFIG))}
    assert outcomes["commit_later"].outcome == "not_supported"
    assert outcomes["arena"].outcome == outcomes["arena_readings"].outcome == "passed"
    assert outcomes["arena"].note.startswith("Static")
    assert "--arena static" in result_of("commit_later", platform, arena="static").reason


def test_reserve_and_commit_without_an_arena_that_does_it_is_caught() -> None:
    platform = fake()
    platform.restrict(arena_backend="static")
    found = result_of("commit_later", platform)
    assert (found.outcome, found.workaround) == ("failed", "--arena static")


def test_a_commit_that_fails_is_caught() -> None:
    class Refusing(FakePlatform):
        def account(self, delta_bytes: int) -> None:
            if delta_bytes > 8 * MIB:
                raise OutOfDeviceMemory("No handle of that size.")
            super().account(delta_bytes)

    found = result_of("arena", Refusing(FakeDevice()))
    assert (found.outcome, found.capability) == ("failed", "reserve_commit")
    assert found.reason == "No handle of that size."


def test_an_account_that_is_not_kept_is_caught() -> None:
    class Forgetful(FakePlatform):
        @property
        def arena_bytes(self) -> int:
            return 0

    assert "the account says 0 B" in result_of("arena", Forgetful(FakeDevice())).reason


def test_a_peak_that_saw_nothing_is_caught() -> None:
    class Blind(FakePlatform):
        def peak_ours_bytes(self) -> int:
            return self.device.ours_bytes

    assert "the peak rose by 0 B" in result_of("peak", Blind(FakeDevice())).reason
    platform = FakePlatform(FakeDevice())
    platform.restrict(resettable_peak=False)
    assert result_of("peak", platform).outcome == "not_supported"


def test_a_peak_that_never_forgets_is_caught() -> None:
    class Elephant(FakePlatform):
        def reset_peak(self) -> None:
            """Keeps it."""

    assert "after reset_peak" in result_of("peak", Elephant(FakeDevice())).reason


def test_an_account_that_passes_the_cap_is_caught() -> None:
    class Loose(FakePlatform):
        def set_cap(self, cap_bytes: int) -> None:
            """Forgets it."""

    found = result_of("cap", Loose(FakeDevice()))
    assert (found.outcome, found.reason) == ("failed", "the account lets an arena pass the cap")


def test_a_cap_the_allocator_ignores_is_caught_where_it_is_declared() -> None:
    platform = CpuPlatform()
    assert result_of("cap", platform).outcome == "passed"
    platform.restrict(cap_enforced=True)
    found = result_of("cap", platform)
    assert found.outcome == "failed"
    assert "were allocated with" in found.reason


def test_errors_that_are_mistaken_are_caught() -> None:
    class Deaf(FakePlatform):
        def as_brim_error(self, error: BaseException) -> BrimError | None:
            return None

    class Nervous(FakePlatform):
        def as_brim_error(self, error: BaseException) -> BrimError | None:
            return super().as_brim_error(error) or OutOfDeviceMemory("surely")

    assert "NoneType" in result_of("errors", Deaf(FakeDevice())).reason
    assert "a ValueError" in result_of("errors", Nervous(FakeDevice())).reason


def test_a_right_graph_passes() -> None:
    for name in ("graph", "graph_commit_later"):
        found = result_of(name, GraphPlatform())
        assert (found.outcome, found.reason) == ("passed", "")


@pytest.mark.parametrize(
    ("fault", "check", "words"),
    [
        ({"runs_inside": True}, "graph", "ran while it was captured"),
        ({"deaf": True}, "graph", "3 replays do not add up: 11 instead of 13"),
        ({"deaf": True}, "graph_commit_later", "in a block committed after the capture"),
    ],
)
def test_a_wrong_graph_is_caught(fault: dict[str, bool], check: str, words: str) -> None:
    found = result_of(check, GraphPlatform(**fault))
    assert (found.outcome, found.capability) == ("failed", "graphs")
    assert words in found.reason
    assert "--enforce-eager" in found.workaround


def test_graphs_that_are_declared_but_not_made_are_caught() -> None:
    found = result_of("graph", fake(graphs=True))
    assert found.outcome == "failed"
    assert found.reason == "Platform 'fake' captures no graphs."


def test_a_dtype_that_does_not_compute_is_caught() -> None:
    platform = fake(dtypes=("float32", "uint16"))
    found = result_of("dtypes", platform)
    assert found.outcome == "failed"
    assert found.reason.startswith("uint16 does not compute")


@pytest.mark.parametrize("kernel", ["rms_norm", "linear", "attention", "sample"])
def test_a_kernel_that_computes_something_else_is_caught(kernel: str) -> None:
    bench = Bench(CpuPlatform(), resolve({"model": "none", "kernels": "torch"}))
    right = getattr(bench.selection.kernels, kernel)

    def wrong(*tensors: Any) -> None:
        right(*tensors)
        tensors[-1].add_(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.selection.kernels, kernel, wrong)
        found = run_check(next(check for check in CHECKS if check.name == f"kernel_{kernel}"), bench)
    assert (found.outcome, found.workaround) == ("failed", "--kernels torch")


def test_an_answer_that_is_not_a_number_fails_and_is_plain_json() -> None:
    bench = Bench(CpuPlatform(), resolve({"model": "none", "kernels": "torch"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.selection.kernels, "rms_norm", lambda x, weight, eps, out: out.fill_(float("nan")))
        found = run_check(next(check for check in CHECKS if check.name == "kernel_rms_norm"), bench)
    assert found.outcome == "failed"
    assert "nan" in found.figures.values()


def test_a_lost_device_is_not_usable() -> None:
    class Lost(FakePlatform):
        def reading(self) -> MemoryReading:
            raise DeviceLost("The device is gone.")

    assert is_usable(Bench(fake(), CONFIG))
    assert not is_usable(Bench(Lost(FakeDevice()), CONFIG))
    assert result_of("readings_sane", Lost(FakeDevice())).reason == "The device is gone."
