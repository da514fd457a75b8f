"""`brim doctor` on an accelerator: what its platform declares is true, and that takes less than a minute."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

pytestmark = [pytest.mark.device, pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")]


def doctor(*flags: str) -> tuple[int, dict[str, object]]:
    command = [sys.executable, "-m", "brim", "doctor", "--json", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def test_the_accelerators_platform_keeps_its_word() -> None:
    started = time.monotonic()
    code, found = doctor()
    assert found["machine"]["capabilities"]["host_memory"] is False, "the accelerator was not chosen"  # type: ignore[index]
    checks = {check["name"]: check for check in found["checks"]}  # type: ignore[attr-defined]
    failed = {name: check["reason"] for name, check in checks.items() if check["outcome"] == "failed"}
    assert (failed, found["problems"], code) == ({}, [], 0)
    capabilities = found["machine"]["capabilities"]  # type: ignore[index]
    if capabilities["graphs"] and capabilities["reserve_commit"]:
        assert checks["graph_commit_later"]["outcome"] == "passed"
    assert checks["readings_move"]["outcome"] == ("passed" if capabilities["trusted_readings"] else "not_supported")
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("flags", [("--enforce-eager",), ("--arena", "static"), ("--kernels", "torch")], ids=lambda f: f[0])
def test_the_workarounds_work(flags: tuple[str, ...]) -> None:
    code, found = doctor(*flags)
    failed = {check["name"]: check["reason"] for check in found["checks"] if check["outcome"] == "failed"}  # type: ignore[attr-defined]
    assert (failed, code) == ({}, 0)
