"""An engine process of letters that goes wrong as the environment says: at a phase of its start, or in a kind of step.

FAULT is JSON: `phase` and `feature` (dies there while it uses that), or `step` (prefill, decode, mixed), and `how`; `once` is a
file: the fault happens where it is not there yet, and makes it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from tests.e2e.faults import happen
from tests.unit.server import letters

from brim.config.avoid import StartUses, apply_recorded
from brim.config.avoid_record import identity_of, read_record
from brim.config.schema import BrimConfig, GraphMode
from brim.engine.core import EngineCore
from brim.engine.engine_process import run_engine_process
from brim.engine.messages import StartupProgress
from brim.engine.step import StepPlan, StepResult

PHASES = ("open", "load", "reserve", "warm", "measure", "capture", "commit", "prove")
FAULT: dict[str, Any] = json.loads(os.environ.get("FAULT", "{}"))


def strike() -> None:
    """Let it happen, unless it was to happen once and did."""
    if (once := FAULT.get("once")) is not None:
        if Path(once).exists():
            return
        Path(once).touch()
    happen(FAULT["how"])


class FaultyExecutor(letters.LetterExecutor):
    """Goes wrong in the steps of one kind."""

    def execute(self, plan: StepPlan) -> StepResult:
        decoding = [int(start) >= seq.num_prompt_tokens for start, seq in zip(plan.start_positions, plan.sequences, strict=True)]
        kind = "decode" if all(decoding) else "mixed" if any(decoding) else "prefill"
        if FAULT.get("step") == kind:
            strike()
        return super().execute(plan)


def build(config: BrimConfig, on_progress: Callable[[StartupProgress], None]) -> tuple[EngineCore, dict[str, Any]]:
    """As `runtime.build_engine_core`."""
    identity = identity_of("letters", {"device": "paper"}, {}, config.model)
    config = apply_recorded(config, read_record(identity))
    device = config.device
    uses = StartUses(
        graph_mode="NONE" if device.enforce_eager else device.graph_mode or "FULL_AND_PIECEWISE",
        graph_modes=get_args(GraphMode),
        compile=device.compile,
        virtual_memory=device.arena != "static",
        vendor_kernels=device.kernels != "torch",
    )
    in_use = {"graphs": uses.graph_mode != "NONE", "whole_graphs": uses.graph_mode not in ("NONE", "PIECEWISE")}
    for phase in PHASES:
        on_progress(StartupProgress(phase, "", identity=identity, uses=uses))
        feature = FAULT.get("feature")
        if FAULT.get("phase") == phase and (feature is None or in_use.get(feature, getattr(uses, feature, False))):
            strike()
    letters.LetterExecutor = FaultyExecutor  # type: ignore[misc]
    core, info = letters.build_letter_core(config, lambda progress: None)
    return core, {**info, "avoided": [[one.feature, one.most] for one in config.avoided], "pid": os.getpid()}


if __name__ == "__main__":
    sys.exit(run_engine_process(build))
