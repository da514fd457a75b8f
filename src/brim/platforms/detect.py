"""Chooses the platform by what works here. Owns the registry of names and the order of preference.

Third parties add a platform as an entry point of group "brim.platforms": name -> a callable that returns a Platform or
raises DeviceError where its device is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import EntryPoint, entry_points

from brim.errors import BrimError, ConfigError, DeviceError
from brim.platforms import hip_driver, level_zero
from brim.platforms.base import Platform
from brim.platforms.cpu import CpuPlatform
from brim.platforms.cuda_driver import is_driver_installed
from brim.platforms.fake import FakeDevice, FakePlatform

GROUP = "brim.platforms"
Factory = Callable[[], Platform]


def _fake() -> Platform:
    return FakePlatform(FakeDevice())


def _cuda() -> Platform:
    if not is_driver_installed():  # before torch is imported to find that out
        raise DeviceError("No CUDA device: the driver is not installed.")
    from brim.platforms.cuda import open_cuda  # optional part: torch, and the vendor's libraries

    return open_cuda()


def _rocm() -> Platform:
    if not hip_driver.is_device_present():
        raise DeviceError("No ROCm device: the kernel shows none.")
    from brim.platforms.rocm import open_rocm  # optional part: torch, and the vendor's libraries

    return open_rocm()


def _xpu() -> Platform:
    if not level_zero.is_device_present():
        raise DeviceError("No XPU device: the kernel shows no graphics device.")
    from brim.platforms.xpu import open_xpu  # optional part: torch, and the vendor's libraries

    return open_xpu()


def _load(point: EntryPoint) -> Platform:
    platform = point.load()()
    if not isinstance(platform, Platform):
        raise DeviceError(f"Device '{point.name}': {point.value} is not a Brim platform.")
    return platform


BUILT_IN: Mapping[str, Factory] = {"cpu": CpuPlatform, "cuda": _cuda, "fake": _fake, "rocm": _rocm, "xpu": _xpu}
# Tried in this order for "auto"; accelerators of third parties come before all of them, the fake is never chosen.
PREFERENCE = ("cuda", "rocm", "xpu", "cpu")


def registered() -> dict[str, Factory]:
    """Every platform by name; a third party's name hides ours."""
    found = dict(BUILT_IN)
    for point in entry_points(group=GROUP):
        found[point.name] = partial(_load, point)
    return found


def detect(name: str = "auto", factories: Mapping[str, Factory] | None = None) -> Platform:
    """The platform of that name, or for "auto" the first that works.

    Raises ConfigError for an unknown name and DeviceError where the named device does not work.
    """
    known = registered() if factories is None else dict(factories)
    if name != "auto":
        if name not in known:
            raise ConfigError(f"--device {name} is not built in; this installation has {', '.join(sorted(known))}.")
        return _open(name, known[name])
    third_party = sorted(set(known) - set(PREFERENCE) - {"fake"})
    failures = []
    for candidate in (*third_party, *(n for n in PREFERENCE if n in known)):
        try:
            return _open(candidate, known[candidate])
        except DeviceError as error:
            failures.append(str(error))
    raise DeviceError("No device works here. " + " ".join(failures))


def _open(name: str, factory: Factory) -> Platform:
    try:
        return factory()
    except BrimError:
        raise
    except Exception as error:
        raise DeviceError(f"Device '{name}' cannot be opened: {error}.") from error
