"""The example of docs/adding-a-platform.md, installed as a third party would install it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[3] / "docs" / "adding-a-platform.md"


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that finds the example."""
    text = PAGE.read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    point = re.search(r'```toml\n\[project\.entry-points\."brim\.platforms"\]\n(.*?)```', text, re.DOTALL)
    assert code and point and len(code[1].splitlines()) <= 60
    (tmp_path / "brim_abacus.py").write_text(code[1])
    info = tmp_path / "brim_abacus-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brim-abacus\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[brim.platforms]\n" + point[1].replace('"', ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}


def test_the_example_passes_the_conformance_command(installed: dict[str, str]) -> None:
    command = [sys.executable, "-m", "brim", "doctor", "--device", "abacus", "--kernels", "torch", "--json"]
    done = subprocess.run(command, env=installed, capture_output=True, text=True, check=False, timeout=300)
    report = json.loads(done.stdout)
    assert report["ok"] and done.returncode == 0, report["problems"]
    assert report["machine"]["platform"] == "abacus" and not report["contradictions"]
    assert next(found for found in report["platforms"] if found["name"] == "abacus")["opened"]
    assert report["start"]["arena"]["backend"] == "static"


def test_auto_prefers_it(installed: dict[str, str]) -> None:
    code = "from brim.platforms.detect import detect; print(detect().name)"
    done = subprocess.run([sys.executable, "-c", code], env=installed, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "abacus", done.stderr
