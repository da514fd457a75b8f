"""Captures steps, and no more of them than there is room for. Owns when fewer graphs are captured than the mode asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from brim.errors import MemoryBudgetError, OutOfDeviceMemory
from brim.kernels.base import Kernels
from brim.memory.plan import MemoryPlan
from brim.platforms.base import Platform
from brim.units import format_bytes
from brim.worker.graph_choice import GraphChoice, with_fewer_graphs
from brim.worker.runner import ModelRunner

_SHARE_OF_GRAPHS = 4


def record(runner: ModelRunner, kernels: Kernels, platform: Platform, choice: GraphChoice) -> Iterator[str]:
    """Capture over the cache's present addresses what the mode asks for; what was captured, one by one."""
    if choice.mode != "NONE":
        native = kernels.can_record
        yield from runner.record(kernels.record if native else platform.capture, choice, (True, False) if native else (False,))


def capture_what_fits(
    runner: ModelRunner,
    kernels: Kernels,
    platform: Platform,
    choice: GraphChoice,
    plan: MemoryPlan,
    on_progress: Callable[[str], None],
) -> GraphChoice:
    """The mode that was captured: less than asked for where graphs take more than their share, which is a quarter of what is left
    for them and the KV cache, or what the plan set aside for them. The size of the next graph is not known before it is there;
    the share keeps it from passing the cap.

    Raises MemoryBudgetError where the mode is binding and does not fit.
    """
    while choice.mode != "NONE":
        before_bytes = platform.reading().ours_bytes
        room_bytes = plan.ceiling_bytes - before_bytes
        share_bytes = max(room_bytes // _SHARE_OF_GRAPHS, min(room_bytes, plan.ledger.bytes_of("graphs")))
        try:
            for done in record(runner, kernels, platform, choice):
                on_progress(done)
                taken_bytes = platform.reading().ours_bytes - before_bytes
                if taken_bytes > share_bytes and not platform.capabilities.host_memory:
                    raise OutOfDeviceMemory(f"graphs took {format_bytes(taken_bytes)} of {format_bytes(share_bytes)} set aside")
            return choice
        except OutOfDeviceMemory as error:
            runner.forget_programs()
            platform.synchronize()
            platform.release_unused()
            if choice.is_binding:
                raise MemoryBudgetError(
                    f"--strict refuses to do without --graph-mode {choice.mode}: {error}. Raise --memory, lower --max-num-seqs, "
                    "or ask for another mode.",
                    ledger=plan.ledger,
                ) from error
            choice = with_fewer_graphs(choice, f"{choice.mode} did not fit: {error}.")
    return choice
