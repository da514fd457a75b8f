"""The commands themselves: what `brim plan` says of settings that do not fit is what `brim serve` refuses with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from brim.platforms.scenario_shapes import SHAPES

LIMITS = [
    [],
    ["--memory", "60%", "--max-model-len", "4096", "--block-size", "32"],
]


def brim(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "BRIM_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "brim", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: " ".join(limits) or "defaults")
def test_serve_refuses_in_the_words_of_the_plan(tmp_path: Path, limits: list[str]) -> None:
    """The device is scripted: 16 GiB, the same in both processes. An 8B model in bfloat16 alone takes 15 of them."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["llama-3.1-8b"]))
    model, device = str(tmp_path / "config.json"), ["--device", "fake"]
    planned = brim("plan", model, *device, *limits, "--json", cache=tmp_path)
    (plan,) = json.loads(planned.stdout)["plans"]
    assert planned.returncode == 1 and plan["fits"] is False
    served = brim("serve", model, *device, *limits, "--load-format", "dummy", "--port", "0", cache=tmp_path)
    assert served.returncode == 1
    assert f"brim: {plan['refused']['message']}\n" in served.stderr
    assert "load:" not in served.stderr, "nothing was loaded"
    for line in plan["refused"]["ledger"]["ledger"]:
        assert f"{line['category']:<17}{line['owner']}" in served.stderr
