"""The guard: gives back at once and enough, takes again slowly, never below the floor or above the target."""

from hypothesis import given, settings
from hypothesis import strategies as st

from brim.config.model_spec import ModelSpec
from brim.memory.footprint import StepLimits
from brim.memory.guard import Guard, GuardSettings
from brim.memory.kv_layout import KVLayout
from brim.memory.kv_split import KVSplit
from brim.units import MIB

from .conftest import DEMO_SPEC


def split_of(spec: ModelSpec) -> KVSplit:
    return KVSplit(KVLayout.of(spec, 16, 2), StepLimits(16, 512, 4096), 4096)


def test_gives_back_what_is_asked_and_little_more(demo_spec: ModelSpec) -> None:
    split = split_of(demo_spec)
    guard = Guard(split, split.enough, split.minimum)
    decision = guard.decide(50 * MIB, split.enough, 0.0)
    assert decision is not None and decision.shortfall_bytes == 0
    freed = split.bytes_for(split.enough) - split.bytes_for(decision.blocks)
    assert 50 * MIB <= freed < 51 * MIB
    assert all(f <= n < c for f, n, c in zip(split.minimum, decision.blocks, split.enough, strict=True))


def test_floor_is_kept_and_the_shortfall_said(demo_spec: ModelSpec) -> None:
    split = split_of(demo_spec)
    guard = Guard(split, split.enough, split.minimum)
    decision = guard.decide(1 << 40, split.enough, 0.0)
    assert decision is not None and decision.blocks == split.minimum
    span = split.bytes_for(split.enough) - split.bytes_for(split.minimum)
    assert decision.shortfall_bytes == (1 << 40) - span
    assert guard.decide(MIB, split.minimum, 1.0) is None
    assert guard.after_out_of_memory(MIB, split.minimum, 1.0) is None


def test_grows_back_in_parts_after_calm_within_room(demo_spec: ModelSpec) -> None:
    split = split_of(demo_spec)
    guard = Guard(split, split.enough, split.minimum)
    assert guard.decide(1 << 40, split.enough, 0.0) is not None
    assert guard.decide(-(1 << 40), split.minimum, 9.9) is None
    now, blocks, growths = 10.0, split.minimum, 0
    while blocks != split.enough:
        decision = guard.decide(-(1 << 40), blocks, now)
        assert decision is not None and all(a >= b for a, b in zip(decision.blocks, blocks, strict=True))
        assert guard.decide(-(1 << 40), decision.blocks, now + 1) is None
        blocks, growths, now = decision.blocks, growths + 1, now + 10
    assert growths == 4
    assert guard.decide(-(1 << 40), blocks, now + 100) is None


def test_growth_keeps_the_margin(demo_spec: ModelSpec) -> None:
    split = split_of(demo_spec)
    guard = Guard(split, split.enough, split.minimum, GuardSettings(margin_bytes=64 * MIB))
    assert guard.decide(-64 * MIB, split.minimum, 0.0) is None
    decision = guard.decide(-70 * MIB, split.minimum, 0.0)
    assert decision is not None
    assert 0 < split.bytes_for(decision.blocks) - split.bytes_for(split.minimum) <= 6 * MIB


def test_pressure_after_growth_doubles_the_wait(demo_spec: ModelSpec) -> None:
    split = split_of(demo_spec)
    guard = Guard(split, split.enough, split.minimum)
    now, blocks = 0.0, split.minimum
    for expected in (20.0, 40.0, 80.0):
        grown = guard.decide(-(1 << 40), blocks, now)
        assert grown is not None
        shrunk = guard.decide(200 * MIB, grown.blocks, now + 1)
        assert shrunk is not None and guard.calm_seconds == expected
        assert guard.decide(-(1 << 40), shrunk.blocks, now + expected) is None
        now, blocks = now + 1 + expected, shrunk.blocks


def test_out_of_memory_gives_back_at_least_a_part(demo_spec: ModelSpec) -> None:
    split = split_of(demo_spec)
    guard = Guard(split, split.enough, split.minimum)
    decision = guard.after_out_of_memory(0, split.enough, 0.0)
    assert decision is not None
    assert split.bytes_for(split.enough) - split.bytes_for(decision.blocks) >= split.bytes_for(split.enough) // 16


@settings(max_examples=60, deadline=None)
@given(events=st.lists(st.tuples(st.integers(-400 * MIB, 400 * MIB), st.floats(0.1, 60)), max_size=30), oom=st.booleans())
def test_any_history_stays_between_floor_and_target(events: list[tuple[int, float]], oom: bool) -> None:
    layout = KVLayout.of(DEMO_SPEC, 16, 2)
    split = KVSplit(layout, StepLimits(8, 256, 2048), 4096)
    guard = Guard(split, split.enough, split.minimum)
    now, blocks = 0.0, split.enough
    for pressure, seconds in events:
        now += seconds
        decide = guard.after_out_of_memory if oom and pressure > 0 else guard.decide
        decision = decide(pressure, blocks, now)
        if decision is None:
            continue
        change = split.bytes_for(decision.blocks) - split.bytes_for(blocks)
        if pressure > 0:
            assert -change + decision.shortfall_bytes >= pressure
        else:
            assert 0 < change <= -pressure
        blocks = decision.blocks
        assert all(f <= n <= t for f, n, t in zip(split.minimum, blocks, split.enough, strict=True))
