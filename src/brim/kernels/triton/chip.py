"""What of a device enters the choice of Triton kernels. Owns `Chip` and how a device is asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from brim.errors import DeviceError

_INTERPRETER_CORES = 2


@dataclass(frozen=True, slots=True)
class Chip:
    """wide_products: its matrix library writes float32 of 16-bit matrices.
    dependent_launch: a kernel can start before the one ahead of it ends. hopper: has that chip's matrix instructions."""

    num_cores: int
    wide_products: bool
    dependent_launch: bool = False
    hopper: bool = False


def chip_of(device: torch.device) -> Chip:
    """Asked of the device itself."""
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    capability = torch.cuda.get_device_capability(device) if is_nvidia else (0, 0)
    return Chip(core_count(device), _has_wide_products(device), capability >= (9, 0), capability == (9, 0))


def core_count(device: torch.device) -> int:
    """Multiprocessors of the device; a token number for the interpreter on a CPU. Raises DeviceError where unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).gpu_subslice_count)
    if device.type == "cpu":
        return _INTERPRETER_CORES
    raise DeviceError(f"Triton kernels do not run on {device.type}")


def _has_wide_products(device: torch.device) -> bool:
    """Whether the matrix library writes float32 products of 16-bit matrices (tried once, on 8 x 8)."""
    small = torch.zeros(8, 8, dtype=torch.bfloat16, device=device)
    try:
        torch.mm(small, small, out_dtype=torch.float32, out=torch.empty(8, 8, device=device))
    except (RuntimeError, TypeError):
        return False
    return True
