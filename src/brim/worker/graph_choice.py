"""Which graph mode a start uses. Owns the resolution of what was asked against what works here, and its reason.

Modes have vLLM's meanings: FULL captures decode steps and small mixed steps whole; PIECEWISE captures what lies between attention
calls, for both; FULL_DECODE_ONLY captures decode steps whole and nothing else; FULL_AND_PIECEWISE captures decode steps whole and
the others piecewise. A decode step captured whole includes sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from brim.config.schema import DeviceConfig, GraphMode
from brim.errors import ConfigError

# Captured whole, a small step with a prompt in it waits for no launch, and its graphs take a quarter of the memory of pieces.
_BEST_FIRST: tuple[GraphMode, ...] = ("FULL", "FULL_AND_PIECEWISE", "FULL_DECODE_ONLY", "PIECEWISE", "NONE")
_NEXT_BEST: dict[GraphMode, tuple[GraphMode, ...]] = {
    "FULL_AND_PIECEWISE": ("FULL_DECODE_ONLY", "PIECEWISE", "NONE"),
    "FULL": ("FULL_DECODE_ONLY", "NONE"),
    "PIECEWISE": ("NONE",),
    "FULL_DECODE_ONLY": ("NONE",),
    "NONE": (),
}


@dataclass(frozen=True, slots=True)
class GraphChoice:
    """The mode that runs, and why in one sentence. is_binding: nothing less will do (--strict)."""

    mode: GraphMode
    reason: str
    is_binding: bool = False

    @property
    def decode_whole(self) -> bool:
        """Decode steps are captured whole."""
        return self.mode in ("FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")

    @property
    def mixed_whole(self) -> bool:
        """Small steps of any kind are captured whole."""
        return self.mode == "FULL"

    @property
    def pieces(self) -> bool:
        """What lies between attention calls is captured."""
        return self.mode in ("PIECEWISE", "FULL_AND_PIECEWISE")


def with_fewer_graphs(choice: GraphChoice, reason: str) -> GraphChoice:
    """The mode that captures less, down to NONE, which captures nothing."""
    return GraphChoice(_NEXT_BEST[choice.mode][0], reason)


def choose_graph_mode(device: DeviceConfig, available: Sequence[GraphMode], why_not_more: str) -> GraphChoice:
    """The mode for these settings where `available` work (NONE always does). why_not_more: said where a mode is missing.

    Raises ConfigError where --enforce-eager and another mode are both asked for; with --strict, where the mode asked for is
    missing.
    """
    asked = device.graph_mode
    if device.enforce_eager:
        if asked not in (None, "NONE"):
            raise ConfigError(f"--enforce-eager and --graph-mode {asked} contradict each other; give only one.")
        return GraphChoice("NONE", "--enforce-eager asks for no graphs.")
    if asked is None:
        mode = _first(_BEST_FIRST, available)
        return GraphChoice(mode, f"The fastest that works here. {why_not_more}".strip())
    if asked in available or asked == "NONE":
        return GraphChoice(asked, "As asked.", is_binding=device.strict)
    if device.strict:
        raise ConfigError(f"--strict refuses to do without --graph-mode {asked}: {why_not_more or 'it does not work here.'}")
    mode = _first(_NEXT_BEST[asked], available)
    return GraphChoice(mode, f"{asked} was asked for, but {why_not_more or 'it does not work here.'}")


def _first(preferred: Sequence[GraphMode], available: Sequence[GraphMode]) -> GraphMode:
    for mode in preferred:
        if mode in available:
            return mode
    return "NONE"
