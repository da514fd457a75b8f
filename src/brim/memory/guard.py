"""While serving: how many KV blocks to give back under pressure and when to take them again. A pure policy; torch-free.

Giving back is immediate and at least what is asked. Taking again waits until the device has been calm, goes in parts and
keeps a margin, and each new pressure soon after a growth doubles the wait: the cache settles instead of swinging.
"""

from __future__ import annotations

from dataclasses import dataclass

from brim.memory.kv_split import KVSplit
from brim.units import MIB, ceil_div


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardSettings:
    """calm_seconds: least quiet before growing. margin_bytes: left untouched when growing. growth_parts: a growth takes at
    most 1/parts of the way from floor to target. oom_parts: an out-of-memory gives back at least 1/parts of the cache."""

    calm_seconds: float = 10.0
    longest_calm_seconds: float = 600.0
    margin_bytes: int = 64 * MIB
    growth_parts: int = 4
    oom_parts: int = 16


@dataclass(frozen=True, slots=True)
class GuardDecision:
    """Blocks each group should hold now, why, and bytes asked for that no block can give (the floor is reached)."""

    blocks: tuple[int, ...]
    reason: str
    shortfall_bytes: int = 0


class Guard:
    """Decides between a floor (one full-length request) and a target (what the start committed)."""

    def __init__(
        self, split: KVSplit, target_blocks: tuple[int, ...], floor_blocks: tuple[int, ...], settings: GuardSettings | None = None
    ) -> None:
        assert all(f <= t for f, t in zip(floor_blocks, target_blocks, strict=True)), "the floor is above the target"
        self._split = split
        self._target = target_blocks
        self._floor = floor_blocks
        self._settings = settings or GuardSettings()
        self._calm_seconds = self._settings.calm_seconds
        self._last_pressure_seconds: float | None = None
        self._last_growth_seconds: float | None = None

    @property
    def calm_seconds(self) -> float:
        """The quiet that growing waits for now."""
        return self._calm_seconds

    def decide(self, pressure_bytes: int, committed: tuple[int, ...], now_seconds: float) -> GuardDecision | None:
        """What to do about Executor.pressure_bytes(): None, or the new sizes."""
        if pressure_bytes > 0:
            self._note_pressure(now_seconds)
            return self._shrink(pressure_bytes, committed, "the device asks for memory back")
        return self._grow(-pressure_bytes, committed, now_seconds)

    def after_out_of_memory(self, needed_bytes: int, committed: tuple[int, ...], now_seconds: float) -> GuardDecision | None:
        """A step ran out of memory: give back what it needed, at least a part of the cache. None at the floor."""
        self._note_pressure(now_seconds)
        part_bytes = self._split.bytes_for(committed) // self._settings.oom_parts
        return self._shrink(max(needed_bytes, part_bytes, 1), committed, "a step ran out of memory")

    def _note_pressure(self, now_seconds: float) -> None:
        """Pressure soon after a growth means that the growth was a mistake: wait longer the next time."""
        grown = self._last_growth_seconds
        if grown is not None and now_seconds - grown < 2 * self._calm_seconds:
            self._calm_seconds = min(2 * self._calm_seconds, self._settings.longest_calm_seconds)
            self._last_growth_seconds = None
        self._last_pressure_seconds = now_seconds

    def _shrink(self, asked_bytes: int, committed: tuple[int, ...], reason: str) -> GuardDecision | None:
        """The largest sizes that give back asked_bytes; the floor where that is not possible."""
        held_bytes = self._split.bytes_for(committed)
        blocks = self._scaled(committed, held_bytes - asked_bytes)
        if blocks == committed:
            return None
        freed_bytes = held_bytes - self._split.bytes_for(blocks)
        return GuardDecision(blocks, reason, max(0, asked_bytes - freed_bytes))

    def _scaled(self, committed: tuple[int, ...], keep_bytes: int) -> tuple[int, ...]:
        """Every group shrunk by the same share of what it has above its floor, so that keep_bytes are not passed."""
        spans = [c - f for c, f in zip(committed, self._floor, strict=True)]
        steps = max(1, *spans)

        def at(step: int) -> tuple[int, ...]:
            pairs = zip(committed, self._floor, strict=True)
            return tuple(min(c, f + (c - f) * step // steps) if c > f else c for c, f in pairs)

        low, high = 0, steps
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._split.bytes_for(at(middle)) <= keep_bytes else (low, middle - 1)
        return at(low)

    def _grow(self, room_bytes: int, committed: tuple[int, ...], now_seconds: float) -> GuardDecision | None:
        missing = [max(0, t - c) for t, c in zip(self._target, committed, strict=True)]
        room_bytes -= self._settings.margin_bytes
        if not any(missing) or room_bytes <= 0:
            return None
        for moment in (self._last_pressure_seconds, self._last_growth_seconds):
            if moment is not None and now_seconds - moment < self._calm_seconds:
                return None
        held_bytes = self._split.bytes_for(committed)
        parts = self._settings.growth_parts
        while True:
            spans = zip(committed, missing, self._target, self._floor, strict=True)
            blocks = tuple(c + min(m, ceil_div(t - f, parts)) for c, m, t, f in spans)
            if self._split.bytes_for(blocks) - held_bytes <= room_bytes:
                break
            if parts > max(self._target):
                return None
            parts *= 2
        self._last_growth_seconds = now_seconds
        if blocks == self._target:
            self._calm_seconds = self._settings.calm_seconds
        return GuardDecision(blocks, "the device has been calm")
