"""Static arrays that the host fills and the device reads. Owns their memory on both sides and the copies between.

Where the device computes in host memory both sides are the same memory and a copy is nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from brim.memory.step_memory import ROW_ALIGNMENT_BYTES, arrays_bytes
from brim.units import round_up

_HOST = torch.device("cpu")


class Mirror:
    """Named arrays in one run of bytes on the device, and the same in page-locked host memory.

    shapes: name -> (bytes of an element, shape...), see memory.step_memory; dtypes: name -> dtype. Arrays lie in this order,
    each at a multiple of 16 bytes. `host` and `device` hold the tensors; page-locked memory lets a copy run beside the host.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], device: torch.device) -> None:
        self.num_bytes = arrays_bytes(shapes)
        shared = device == _HOST
        self._host = torch.zeros(self.num_bytes, dtype=torch.uint8, pin_memory=not shared)
        self._device = self._host if shared else torch.zeros(self.num_bytes, dtype=torch.uint8, device=device)
        self._shared = shared
        self._ranges: dict[str, tuple[int, int]] = {}
        self.host: dict[str, Tensor] = {}
        self.device: dict[str, Tensor] = {}
        start = 0
        for name, (element_bytes, *shape) in shapes.items():
            dtype = dtypes[name]
            assert dtype.itemsize == element_bytes, f"{name} has another element size"
            size = element_bytes * math.prod(shape)
            self._ranges[name] = (start, start + size)
            self.host[name] = self._host[start : start + size].view(dtype).view(shape)
            self.device[name] = self._device[start : start + size].view(dtype).view(shape)
            start = round_up(start + size, ROW_ALIGNMENT_BYTES)

    def upload(self, name: str, rows: int) -> None:
        """Queue a copy of the first `rows` rows of one array to the device."""
        if not self._shared:
            self.device[name][:rows].copy_(self.host[name][:rows], non_blocking=True)

    def upload_span(self, first: str, last: str) -> None:
        """Queue one copy of everything from array `first` to array `last`, whole."""
        if not self._shared:
            start, end = self._ranges[first][0], self._ranges[last][1]
            self._device[start:end].copy_(self._host[start:end], non_blocking=True)

    def download_span(self, first: str, last: str) -> None:
        """Queue one copy of all from array `first` to array `last` to the host; complete once the device is synchronized."""
        if not self._shared:
            start, end = self._ranges[first][0], self._ranges[last][1]
            self._host[start:end].copy_(self._device[start:end], non_blocking=True)
