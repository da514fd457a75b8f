"""What runs on a CUDA device, over a scripted one: captures end cleanly, foreign errors are understood, any thread may wait."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from tests.unit.platforms.scripted_gpu import Opened

from brim.errors import DeviceError, DeviceLost, OutOfDeviceMemory


def test_a_capture_is_ended_whatever_happens() -> None:
    opened = Opened()
    with opened.platform.capture() as graph:
        pass
    assert graph is opened.runtime.captures[0] and not opened.runtime.entered and not opened.runtime.captures[0].is_capturing
    with pytest.raises(KeyError), opened.platform.capture():
        raise KeyError("a bug in the work")
    with pytest.raises(RuntimeError, match="size of tensor"), opened.platform.capture():
        raise RuntimeError("The size of tensor a must match")  # the capture itself went on: the work's own error
    assert not any(graph.is_capturing for graph in opened.runtime.captures) and opened.runtime.ended_pools == []
    assert len({graph.pool for graph in opened.runtime.captures}) == 1
    assert opened.runtime.entered == 0


def test_a_pool_whose_graphs_are_gone_is_not_used_again() -> None:
    opened = Opened()
    with opened.platform.capture() as graph:
        pass
    dead = graph.pool  # type: ignore[attr-defined]
    opened.runtime.captures.clear()
    del graph
    with opened.platform.capture() as first:
        pass
    with suppress(KeyError), opened.platform.capture():
        raise KeyError("a bug in the work")
    with opened.platform.capture() as second:
        pass
    assert first.pool == second.pool != dead  # type: ignore[attr-defined]


@pytest.mark.parametrize("where", ["begin", "end", "work"])
@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("CUDA error: operation not permitted when stream is capturing", DeviceError),
        ("CUDA error: an illegal memory access was encountered", DeviceLost),
        ("CUDA error: out of memory", OutOfDeviceMemory),
        ("a library has no such kernel", DeviceError),
    ],
)
def test_a_broken_capture_leaves_the_allocator_clean(where: str, text: str, kind: type[Exception]) -> None:
    opened = Opened()
    opened.runtime.capture_fails["begin" if where == "begin" else "end"] = RuntimeError(text)
    with pytest.raises((DeviceError, OutOfDeviceMemory)) as caught, opened.platform.capture():
        if where == "work":
            raise RuntimeError(text)
    assert type(caught.value) is kind and isinstance(caught.value.__cause__, RuntimeError)
    broken = opened.runtime.captures[-1]
    assert opened.runtime.ended_pools == [("end", broken.pool), ("release", broken.pool)]
    opened.runtime.capture_fails.clear()
    with opened.platform.capture() as graph:
        pass
    assert graph.pool != broken.pool and opened.runtime.entered == 0  # type: ignore[attr-defined]


def test_a_graph_that_fails_after_its_recording_is_not_released_twice() -> None:
    opened = Opened()

    def refuse(index: int, pool: object) -> None:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    opened.runtime.memory._cuda_endAllocateToPool = refuse
    opened.runtime.capture_fails["end"] = RuntimeError("CUDA error: out of memory")  # the graph cannot be made executable
    with pytest.raises(OutOfDeviceMemory), opened.platform.capture():
        pass
    assert opened.runtime.ended_pools == []


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), OutOfDeviceMemory),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), OutOfDeviceMemory),
        (RuntimeError("Triton Error [CUDA]: out of memory"), OutOfDeviceMemory),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), DeviceLost),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), DeviceLost),
        (torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing"), DeviceError),
        (RuntimeError("The size of tensor a must match"), None),
        (RuntimeError(""), None),
        (ValueError("CUDA error"), None),
    ],
)
def test_what_foreign_errors_mean(error: Exception, kind: type[Exception] | None) -> None:
    known = Opened().platform.as_brim_error(error)
    assert known is None if kind is None else type(known) is kind


def test_the_driver_waits_on_a_thread_without_a_context() -> None:
    opened = Opened()
    opened.bindings.context = 0
    opened.platform.virtual_memory().synchronize()
    assert opened.bindings.context != 0
    opened.gpu.failing["cuCtxSynchronize"] = [700]
    with pytest.raises(DeviceLost):
        opened.platform.virtual_memory().synchronize()
