"""Chooses the kernels for a device. Owns the order of preference and keeps the reason when a fallback was taken."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from brim.errors import BrimError
from brim.kernels.base import Kernels
from brim.kernels.torch_ref import TorchKernels
from brim.kernels.triton.scratch import KernelLimits


@dataclass(frozen=True, slots=True)
class KernelSelection:
    """The kernels to use. `fallback_reason` says why a faster backend is not used, for reports; None: the best one is."""

    kernels: Kernels
    fallback_reason: str | None


def select_kernels(
    device: torch.device | str,
    num_threads: int | None = None,
    max_head_dim: int = 256,
    native: bool = True,
    limits: KernelLimits | None = None,
) -> KernelSelection:
    """The best kernels that work on device: on a CPU the native ones, compiled now if need be; elsewhere Triton's.

    num_threads (CPU only): kernel threads, the caller's included; None: as many as the process may run on.
    max_head_dim (CPU only): the largest head_dim of the model. native=False asks for the reference.
    limits (accelerators only): what the Triton kernels size their scratch memory for.
    """
    device = torch.device(device)
    if not native:
        return KernelSelection(TorchKernels(device), "native kernels were switched off")
    if device.type != "cpu":
        return _triton(device, limits)
    # optional part: imported only where it is wanted
    from brim.kernels.cpu.build import build
    from brim.kernels.cpu.kernels import CpuKernels

    result = build()
    if result.path is None:
        return KernelSelection(TorchKernels(device), result.reason)
    try:
        return KernelSelection(CpuKernels(result.path, num_threads, max_head_dim), None)
    except (OSError, BrimError) as error:
        return KernelSelection(TorchKernels(device), f"native kernels do not load: {error}")


def _triton(device: torch.device, limits: KernelLimits | None) -> KernelSelection:
    if limits is None:
        return KernelSelection(TorchKernels(device), "the limits that the Triton kernels are made for are not known")
    try:  # optional part
        from brim.kernels.triton.kernels import TritonKernels
    except ImportError as error:
        return KernelSelection(TorchKernels(device), f"Triton is not installed: {error}")
    try:
        return KernelSelection(TritonKernels(device, limits), None)
    except BrimError as error:
        return KernelSelection(TorchKernels(device), f"the Triton kernels do not work here: {error}")
