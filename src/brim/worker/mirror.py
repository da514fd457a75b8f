"""Static arrays that the host fills and the device reads. Owns their memory on both sides and the copies between.

Where the device computes in host memory, one step at a time, both sides are the same memory and a copy is nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from brim.memory.step_memory import ROW_ALIGNMENT_BYTES, arrays_bytes
from brim.units import round_up

_HOST = torch.device("cpu")


class Mirror:
    """Named arrays in one run of bytes on the device, and the same in page-locked host memory, once for each step in flight.

    shapes: name -> (bytes of an element, shape...), see memory.step_memory; dtypes: name -> dtype. Arrays lie in this order,
    each at a multiple of 16 bytes. `device` holds the tensors, `host` numpy arrays over the present set of host memory; `turn`
    goes on to the next set, so that the host writes the next step while the copies of this one are still under way.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        device: torch.device,
        num_sets: int = 1,
    ) -> None:
        self.num_bytes = arrays_bytes(shapes)
        in_host = device == _HOST
        self._shared = in_host and num_sets == 1
        self._ranges = _ranges(shapes)
        first = torch.zeros(self.num_bytes, dtype=torch.uint8, pin_memory=not in_host)
        self._device = first if self._shared else torch.zeros(self.num_bytes, dtype=torch.uint8, device=device)
        self._sets = [first, *(torch.zeros_like(first, pin_memory=not in_host) for _ in range(num_sets - 1))]
        self.device = self._views(self._device, shapes, dtypes)
        self._tensors = [self._views(memory, shapes, dtypes) for memory in self._sets]
        self._arrays = [
            {name: tensor.numpy() for name, tensor in tensors.items() if tensor.dtype.itemsize != 2} for tensors in self._tensors
        ]
        self._turn = 0

    def _views(
        self, memory: Tensor, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, Tensor]:
        views = {}
        for name, (element_bytes, *shape) in shapes.items():
            assert dtypes[name].itemsize == element_bytes, f"{name} has another element size"
            start, end = self._ranges[name]
            views[name] = memory[start:end].view(dtypes[name]).view(shape)
        return views

    @property
    def host(self) -> dict[str, NDArray[Any]]:
        """Arrays over the present set (of 16-bit types there is none: numpy lacks bfloat16)."""
        return self._arrays[self._turn]

    def turn(self) -> None:
        """Go on to the next set of host memory. What was queued from it has been waited for."""
        self._turn = (self._turn + 1) % len(self._sets)

    def upload(self, name: str, rows: int) -> None:
        """Queue a copy of the first `rows` rows of one array to the device."""
        if not self._shared:
            self.device[name][:rows].copy_(self._tensors[self._turn][name][:rows], non_blocking=True)

    def upload_span(self, first: str, last: str, rows: int | None = None) -> None:
        """Queue one copy of everything from array `first` to array `last`, of which only the first `rows` rows where given."""
        if not self._shared:
            start, end = self._ranges[first][0], self._ranges[last][1]
            if rows is not None:
                end = self._ranges[last][0] + self.device[last][:rows].nbytes
            self._device[start:end].copy_(self._sets[self._turn][start:end], non_blocking=True)

    def download_span(self, first: str, last: str) -> None:
        """Queue one copy of all from array `first` to array `last` to the host; complete once the device is synchronized."""
        if not self._shared:
            start, end = self._ranges[first][0], self._ranges[last][1]
            self._sets[self._turn][start:end].copy_(self._device[start:end], non_blocking=True)


def _ranges(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """First and end byte of each array."""
    ranges, start = {}, 0
    for name, shape in shapes.items():
        end = start + math.prod(shape)
        ranges[name] = (start, end)
        start = round_up(end, ROW_ALIGNMENT_BYTES)
    return ranges
