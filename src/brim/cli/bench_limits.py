"""The process that measures what this device can do at best, so that its buffers are never an engine's. Not a verb.

Owns three limits: how fast memory moves, how fast a large matrix product runs, and how long a model's matrix products alone
take through the vendor's library, all of them in one graph. Prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from brim.cli.errors import report_error
from brim.errors import BrimError
from brim.runtime import EngineParts

REPEATS = 8
SIZE, HOST_SIZE = 8192, 2048  # of a large product
COPIES_A_TIMING = 8  # queued copies share one wait, which would cost a few percent of a single one


def main() -> int:
    """Measure what argv[1], a JSON object, asks for: device (as --device has it), num_threads (0: torch's choice), buffer_bytes;
    products (whether to time a large one); linears: model -> [[outputs, inputs, how many], ...]; rows of these products."""
    task = json.loads(sys.argv[1])
    if task["num_threads"]:
        torch.set_num_threads(task["num_threads"])
    try:
        platform = EngineParts().detect(task["device"])
        with platform.stream():
            found: dict[str, Any] = {"bandwidth_bytes_per_s": bandwidth(platform, task["buffer_bytes"])}
            if task.get("products"):
                found["matmul_flops"] = product_flops(platform, HOST_SIZE if platform.capabilities.host_memory else SIZE)
            if platform.capabilities.graphs:
                found["linears_ms"] = {
                    name: _or_why_not(lambda shapes=shapes: linears_ms(platform, shapes, task["rows"]))  # type: ignore[misc]
                    for name, shapes in task.get("linears", {}).items()
                }
    except BrimError as error:
        report_error(error)
        return 1
    found |= {"host_memory": platform.capabilities.host_memory, "device": platform.describe()}
    print(json.dumps(found, default=str))
    return 0


def _or_why_not(work: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """The other limits are of use without this one: weights that do not fit, work that cannot be captured."""
    try:
        return work()
    except (RuntimeError, BrimError) as error:
        return {"failed": str(error).partition("\n")[0]}


def bandwidth(platform: Any, buffer_bytes: int) -> float:
    """Bytes per second: the best of some reads of a whole buffer (a limit is what can be reached, not the mean).

    Elsewhere than in host memory a copy is timed, which reads and writes each byte.
    """
    source = torch.ones(buffer_bytes // 8, dtype=torch.int64, device=platform.torch_device())
    if platform.capabilities.host_memory:
        return buffer_bytes / min(_seconds_of(platform, lambda: source.sum()))
    target = torch.empty_like(source)
    return 2 * buffer_bytes * COPIES_A_TIMING / min(_seconds_of(platform, lambda: target.copy_(source), COPIES_A_TIMING))


def product_flops(platform: Any, size: int) -> float:
    """Operations per second of a bfloat16 product of two random square matrices: the best of some."""
    left, right = (torch.randn(size, size, device=platform.torch_device()).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / min(_seconds_of(platform, lambda: torch.mm(left, right, out=out)))


def linears_ms(platform: Any, shapes: Sequence[Sequence[int]], rows: Sequence[int]) -> dict[str, float]:
    """rows -> milliseconds of all these products in bfloat16, each with weights of its own, replayed as one graph."""
    device = platform.torch_device()
    weights = [
        torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
        for outputs, inputs, count in shapes
        for _ in range(count)
    ]
    found = {}
    for count in rows:
        inputs_of = {width: torch.randn(count, width, device=device).bfloat16() for _, width, _ in shapes}
        outs = {height: torch.empty(count, height, device=device, dtype=torch.bfloat16) for height, _, _ in shapes}
        found[str(count)] = _graph_ms(platform, lambda x=inputs_of, y=outs: _products(weights, x, y))  # type: ignore[misc]
    return found


def _products(weights: Sequence[torch.Tensor], inputs_of: Mapping[int, torch.Tensor], outs: Mapping[int, torch.Tensor]) -> None:
    for weight in weights:
        torch.mm(inputs_of[weight.shape[1]], weight.t(), out=outs[weight.shape[0]])


def _graph_ms(platform: Any, work: Callable[[], None]) -> float:
    work()
    platform.synchronize()
    with platform.capture() as graph:
        work()
    return statistics.median(_seconds_of(platform, graph.replay)) * 1000


def _seconds_of(platform: Any, work: Callable[[], object], times: int = 1) -> list[float]:
    """Seconds of `times` calls and one wait, REPEATS times, after a first that does not count."""
    found = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        for _ in range(times):
            work()
        platform.synchronize()
        found.append(time.perf_counter() - started)
    return found[1:]


if __name__ == "__main__":
    sys.exit(main())
