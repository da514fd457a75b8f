"""The real engine on a scripted accelerator: `brim.engine_main` with stored graphs, over the reference kernels.

FAULT is JSON: `phase` (reserve, warm, capture) and `how`: what happens there, wherever that feature is used.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.e2e.faults import happen
from tests.unit.worker.test_graph_modes import StoredGraph, StoredKernels, StoringPlatform

from brim.config.schema import BrimConfig
from brim.engine.core import EngineCore
from brim.engine.engine_process import run_engine_process
from brim.engine.messages import StartupProgress
from brim.kernels.select import KernelSelection
from brim.runtime import EngineParts, build_engine_core


class ScriptedPlatform(StoringPlatform):
    """Whole decode steps can be captured, says the driver."""

    name = "scripted"

    def __init__(self, kernels: StoredKernels, fault: dict[str, str]) -> None:
        super().__init__(kernels, async_tokens=False)
        self.restrict(graph_modes=("NONE", "FULL_DECODE_ONLY"))
        self._fault = fault

    @contextmanager
    def capture(self) -> Iterator[StoredGraph]:
        """Until it is used."""
        if self._fault.get("phase") == "capture":
            happen(self._fault["how"])
        with super().capture() as graph:
            yield graph

    def memory_view(self, address: int, num_bytes: int) -> Any:
        """Virtual memory that cannot be looked at."""
        if self._fault.get("phase") == "reserve" and self.capabilities.reserve_commit:
            happen(self._fault["how"])
        return super().memory_view(address, num_bytes)

    def describe(self) -> dict[str, object]:
        """With a driver."""
        return {**super().describe(), "driver": "1.0"}


def compiler(fault: dict[str, str]) -> Callable[..., Any]:
    """A backend of torch.compile that gives back what it is given, but for the model when it is to go wrong."""

    def compile_nothing(graph: Any, inputs: list[Any]) -> Any:
        if fault.get("phase") == "warm" and len(inputs) > 2:
            happen(fault["how"])
        return graph

    return compile_nothing


def scripted_parts(fault: dict[str, str]) -> EngineParts:
    """For `build_engine_core`."""
    kernels = StoredKernels()
    return EngineParts(
        detect=lambda name: ScriptedPlatform(kernels, fault),
        select_kernels=lambda *args: KernelSelection(kernels, None),
        compile_backend=compiler(fault),
    )


def build(config: BrimConfig, on_progress: Callable[[StartupProgress], None]) -> tuple[EngineCore, dict[str, Any]]:
    """The engine over scripted parts."""
    return build_engine_core(config, on_progress, parts=scripted_parts(json.loads(os.environ["FAULT"])))


if __name__ == "__main__":
    sys.exit(run_engine_process(build))
