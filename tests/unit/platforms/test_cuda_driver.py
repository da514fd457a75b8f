"""The driver's calls over a scripted one: what its errors mean, virtual memory that is refused, choosing CUDA at all."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from tests.unit.platforms.scripted_driver import INVALID_VALUE, OUT_OF_MEMORY, ScriptedDriver
from tests.unit.platforms.scripted_gpu import PID, Opened, ScriptedGpu, small_gpu

from brim.errors import DeviceError, DeviceLost, OutOfDeviceMemory
from brim.platforms import cuda_driver
from brim.platforms.cpu import CpuPlatform
from brim.platforms.cuda_driver import CudaDriver, is_driver_installed
from brim.platforms.detect import BUILT_IN, detect
from brim.units import MIB

UNIT_BYTES = 2 * MIB
NOT_SUPPORTED = 801
LOST = (214, 220, 700, 702, 710, 714, 715, 716, 717, 718, 719)


class Setup:
    """A driver over a scripted GPU."""

    def __init__(self) -> None:
        self.gpu = small_gpu(PID)
        self.bindings = ScriptedDriver(self.gpu)
        self.driver = CudaDriver(0, self.bindings)

    def require_clean(self) -> None:
        """No range, no memory."""
        assert (self.bindings.ranges, self.bindings.handles) == ({}, {})


CALLS: dict[str, Callable[[CudaDriver], object]] = {
    "cuMemAddressReserve": lambda driver: driver.reserve(UNIT_BYTES),
    "cuMemCreate": lambda driver: driver.create(UNIT_BYTES),
    "cuCtxSynchronize": lambda driver: driver.synchronize(),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("code", "kind"),
    [(OUT_OF_MEMORY, OutOfDeviceMemory), (INVALID_VALUE, DeviceError), (NOT_SUPPORTED, DeviceError)]
    + [(code, DeviceLost) for code in LOST],
)
def test_what_a_code_means(name: str, code: int, kind: type[Exception]) -> None:
    setup = Setup()
    setup.gpu.failing[name] = [code]
    with pytest.raises((DeviceError, OutOfDeviceMemory)) as caught:
        CALLS[name](setup.driver)
    assert type(caught.value) is kind and (name in str(caught.value) or name == "cuMemCreate")
    setup.require_clean()


def test_memory_that_is_not_there_names_the_knob() -> None:
    setup = Setup()
    with pytest.raises(OutOfDeviceMemory, match=r"100\.00 GiB of KV cache .* lower --memory"):
        setup.driver.create(100 * 1024 * MIB)


def test_memory_is_mapped_whole_readable_and_writable() -> None:
    setup = Setup()
    address = setup.driver.reserve(2 * UNIT_BYTES)
    handle = setup.driver.create(UNIT_BYTES)
    setup.driver.map(address + UNIT_BYTES, UNIT_BYTES, handle)
    setup.bindings.write(address + UNIT_BYTES, 5)
    with pytest.raises(DeviceError):  # occupied
        setup.driver.map(address + UNIT_BYTES, UNIT_BYTES, setup.driver.create(UNIT_BYTES))
    with pytest.raises(DeviceError):
        setup.driver.free_range(address, 2 * UNIT_BYTES)
    setup.driver.synchronize()
    setup.driver.unmap(address + UNIT_BYTES, UNIT_BYTES)
    for made in tuple(setup.bindings.handles):
        setup.driver.release(made)
    setup.driver.free_range(address, 2 * UNIT_BYTES)
    setup.require_clean()


@pytest.mark.parametrize("code", [OUT_OF_MEMORY, INVALID_VALUE, 700])
def test_memory_that_may_not_be_accessed_is_not_left_mapped(code: int) -> None:
    setup = Setup()
    address, handle = setup.driver.reserve(UNIT_BYTES), setup.driver.create(UNIT_BYTES)
    setup.gpu.failing["cuMemSetAccess"] = [code]
    with pytest.raises((DeviceError, OutOfDeviceMemory)):
        setup.driver.map(address, UNIT_BYTES, handle)
    assert setup.bindings.mapped_bytes == 0
    setup.driver.map(address, UNIT_BYTES, handle)
    assert setup.bindings.mapped_bytes == UNIT_BYTES


def test_asking_for_the_context_creates_none() -> None:
    setup = Setup()
    assert not setup.driver.has_context() and setup.gpu.ours == {}
    setup.gpu.make_context()
    assert setup.driver.has_context()


@pytest.mark.parametrize("name", ["cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess"])
def test_virtual_memory_that_is_claimed_and_refused(name: str) -> None:
    gpu = ScriptedGpu(PID)
    gpu.failing[name] = [NOT_SUPPORTED]
    opened = Opened(gpu)
    capabilities = opened.platform.capabilities
    assert (capabilities.arena_backend, capabilities.reserve_commit) == ("static", False)
    assert name in opened.platform.reasons["reserve_commit"]
    assert (opened.bindings.ranges, opened.bindings.handles) == ({}, {})
    opened.require_truth()


def test_trying_it_out_leaves_nothing_and_a_full_device_refuses_nothing() -> None:
    opened = Opened()
    assert (opened.bindings.ranges, opened.bindings.handles) == ({}, {}) and opened.platform.reasons == {}
    gpu = ScriptedGpu(PID)
    gpu.neighbours[7] = gpu.free_bytes - gpu.context_bytes - MIB
    full = Opened(gpu)
    assert full.platform.capabilities.reserve_commit and not full.bindings.ranges
    lost = ScriptedGpu(PID)
    lost.failing["cuMemMap"] = [700]
    with pytest.raises(DeviceLost):
        Opened(lost)


def test_what_is_missing_is_said_in_a_sentence() -> None:
    assert "not installed" in Opened(driver=False).platform.reasons["reserve_commit"]
    old = ScriptedGpu(PID, attributes={"CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED": 0})
    assert "no virtual memory" in Opened(old).platform.reasons["reserve_commit"]


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: no kernel image is available for execution on the device",
        "CUDA error: invalid configuration argument",
        "CUDA error: too many resources requested for launch",
        "CUDA error: invalid device function",
    ],
)
@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError])
def test_a_launch_that_never_began_has_not_lost_the_device(text: str, kind: type[RuntimeError]) -> None:
    known = Opened().platform.as_brim_error(kind(text + "\nCompile with TORCH_USE_CUDA_DSA"))
    assert type(known) is DeviceError and text in str(known) and "\n" not in str(known)


def test_auto_goes_on_without_a_driver_and_a_name_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> object:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", absent)
    assert not is_driver_installed()
    factories = {"cuda": BUILT_IN["cuda"], "cpu": CpuPlatform}
    with pytest.raises(DeviceError, match=r"^No CUDA device: the driver is not installed\.$"):
        detect("cuda", factories)
    monkeypatch.undo()
    if not is_driver_installed():
        assert isinstance(detect("auto", factories), CpuPlatform)


def test_auto_goes_on_where_torch_was_built_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    real = ctypes.CDLL
    installed = {"libcuda.so.1", "nvcuda.dll"}
    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", lambda name, *rest, **more: real(None if name in installed else name))
    factories = {"cuda": BUILT_IN["cuda"], "cpu": CpuPlatform}
    with pytest.raises(DeviceError, match="No CUDA device: torch was built without CUDA"):
        detect("cuda", factories)
    assert isinstance(detect("auto", factories), CpuPlatform)
