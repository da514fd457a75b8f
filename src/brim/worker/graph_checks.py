"""Conformance checks of captured work: a graph alone, over pages committed after its capture, and of the chosen kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from brim.platforms.base import DeviceGraph
from brim.worker.check_bench import Bench, CheckFailed, Figures, Found, NotSupported
from brim.worker.compute_checks import norm_case

_REPLAYS = 3


def graph(bench: Bench) -> Found:
    """A capture runs nothing; each replay runs all of it once, on the values that are there then."""
    _require_graphs(bench)
    numbers = torch.zeros(1024, dtype=torch.float32, device=bench.device)
    numbers.add_(1)
    before_bytes = bench.reading().ours_bytes
    captured = _capture(bench, lambda: numbers.add_(1))
    figures: Figures = {"graph_bytes": bench.reading().ours_bytes - before_bytes, "replays": _REPLAYS}
    _require_all(numbers, 1.0, "the captured work ran while it was captured")
    numbers.fill_(10)
    for _ in range(_REPLAYS):
        captured.replay()
    bench.platform.synchronize()
    _require_all(numbers, 10.0 + _REPLAYS, f"{_REPLAYS} replays do not add up")
    return Found(figures)


def graph_commit_later(bench: Bench) -> Found:
    """A graph captured over a range of which one block was committed writes to a block committed after the capture, and to the
    same addresses once they were uncommitted and committed again."""
    _require_graphs(bench)
    if not bench.platform.capabilities.reserve_commit:
        asked = bench.config.device.arena == "static"
        raise bench.without("reserve and commit", "--arena static asks to do without." if asked else "")
    with bench.arena() as (made, blocks):
        made.commit(1)
        view = bench.view(made)
        view[:1024].fill_(0)
        view[:1024].add_(1)
        later = view[(blocks - 1) * made.block_bytes : blocks * made.block_bytes]
        captured = _capture(bench, lambda: later.add_(1))
        for attempt in ("committed after the capture", "uncommitted and committed again"):
            made.commit(blocks)
            later.fill_(5)
            captured.replay()
            captured.replay()
            bench.platform.synchronize()
            _require_all(later, 7, f"two replays do not add up in a block {attempt}")
            made.uncommit(1)
        figures: Figures = {"range_bytes": view.numel(), "written_bytes": later.numel()}
        del captured
    return Found(figures)


def graph_kernels(bench: Bench) -> Found:
    """A kernel of the chosen backend is captured and gives the same when replayed."""
    kernels = bench.selection.kernels
    if kernels.can_record:
        raise NotSupported(f"The {kernels.name} kernels store their calls themselves; no graph is needed.")
    if not kernels.can_capture:
        raise NotSupported(f"The {kernels.name} kernels cannot be captured.")
    _require_graphs(bench)
    x, weight, _ = norm_case(bench, bench.platform.capabilities.dtypes[0])
    out, expected = torch.empty_like(x), torch.empty_like(x)
    kernels.rms_norm(x, weight, 1e-6, expected)
    captured = _capture(bench, lambda: kernels.rms_norm(x, weight, 1e-6, out))
    out.zero_()
    captured.replay()
    bench.platform.synchronize()
    if not torch.equal(out, expected):
        raise CheckFailed("a replayed rms_norm differs from the one that ran by itself")
    return Found()


def _require_graphs(bench: Bench) -> None:
    if not bench.platform.capabilities.graphs:
        asked = bench.config.device.enforce_eager
        raise bench.without("graphs", "--enforce-eager asks to do without." if asked else "")


def _capture(bench: Bench, work: Callable[[], object]) -> DeviceGraph:
    bench.platform.synchronize()
    with bench.platform.capture() as captured:
        work()
    return captured


def _require_all(values: torch.Tensor, expected: float, otherwise: str) -> None:
    wrong = values != expected
    if bool(wrong.any()):
        seen = float(values[wrong][0])
        raise CheckFailed(f"{otherwise}: {seen:g} instead of {expected:g} in {int(wrong.sum())} of {values.numel()} places")
