"""Choosing a platform by what works."""

import subprocess
import sys

import pytest

from brim.errors import ConfigError, DeviceError
from brim.platforms.base import Platform
from brim.platforms.cpu import CpuPlatform
from brim.platforms.detect import detect, registered
from brim.platforms.fake import FakeDevice, FakePlatform


def broken() -> Platform:
    raise DeviceError("The driver is too old.")


def crashing() -> Platform:
    raise RuntimeError("no symbol")


def fake() -> Platform:
    return FakePlatform(FakeDevice())


def test_auto_takes_the_first_that_works() -> None:
    assert isinstance(detect("auto", {"cuda": broken, "cpu": CpuPlatform}), CpuPlatform)
    assert isinstance(detect("auto", {"xpu": crashing, "cpu": CpuPlatform, "fake": fake}), CpuPlatform)
    assert isinstance(detect("auto", {"other": fake, "cpu": CpuPlatform}), FakePlatform), "third parties come first"


def test_named_devices_say_what_is_wrong() -> None:
    with pytest.raises(DeviceError, match="too old"):
        detect("cuda", {"cuda": broken})
    with pytest.raises(DeviceError, match="'cuda' cannot be opened: no symbol"):
        detect("cuda", {"cuda": crashing})
    with pytest.raises(ConfigError, match="--device xpu is not built in; this installation has cpu, fake"):
        detect("xpu", {"cpu": CpuPlatform, "fake": fake})
    with pytest.raises(DeviceError, match=r"No device works here\. The driver is too old\."):
        detect("auto", {"cuda": broken, "fake": fake})


def test_built_in() -> None:
    assert {"cpu", "fake"} <= set(registered())
    assert detect().name == "cpu"
    assert detect("fake").name == "fake"


def test_planning_needs_no_torch() -> None:
    modules = "brim.platforms.detect, brim.memory.planner, brim.memory.report, brim.memory.certificate"
    modules += ", brim.memory.arena.factory"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
