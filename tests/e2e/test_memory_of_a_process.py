"""The cap holds for the whole process, from its start to its end, and what is closed is given back. Figures with -rP."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.small_models import write_small_model

from brim.errors import ModelNotFound
from brim.formats.model_files import resolve_model

MIB = 1 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's account of a process")

PRELUDE = """
import json, sys
from pathlib import Path
from brim import LLM, SamplingParams

def status(key):
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(key))

"""

LOADED = (
    PRELUDE
    + """
llm = LLM("demo", memory="1100MiB", max_model_len=1024)
figures = {"cap": llm.info["cap_bytes"], "start": status("VmHWM"), "seqs": llm.info["max_num_seqs"]}
held = []
for round in range(4):
    # long prompts, many sequences, log-probabilities and penalties: all that takes memory
    prompts = [[2 + (7 * i + 3 * j + round) % 5000 for j in range(60 + 60 * (i % 4))] for i in range(6)]
    params = [
        SamplingParams(temperature=0.8, max_tokens=8, logprobs=5 if i % 2 else None, prompt_logprobs=2 if i == 3 else None,
                       frequency_penalty=0.5 if i % 3 == 0 else 0.0, seed=i, ignore_eos=True)
        for i in range(6)
    ]
    llm.generate(prompts, params)
    held.append(status("VmRSS"))
figures.update(peak=status("VmHWM"), held=held, stats=llm.stats())
llm.close()
print(json.dumps(figures))
"""
)

CLOSED = (
    PRELUDE
    + """
import gc
held = []
for _ in range(4):
    llm = LLM(sys.argv[1], memory=f"{(status('VmRSS') >> 20) + 200}MiB", max_model_len=512, max_num_seqs=64, block_size=32)
    kv_bytes = llm.memory()["kv"]["committed_bytes"]
    llm.generate([[1, 2, 3]] * 8, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    before = status("VmRSS")
    llm.close()
    llm.close()
    del llm
    gc.collect()
    held.append(status("VmRSS"))
print(json.dumps({"held": held, "given_back": before - held[-1], "kv": kv_bytes}))
"""
)


def run(code: str, *arguments: str) -> dict[str, Any]:
    child = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    figures: dict[str, Any] = json.loads(child.stdout)
    print(
        {name: f"{value / MIB:.1f} MiB" if isinstance(value, int) and value > MIB else value for name, value in figures.items()}
    )
    return figures


def test_the_cap_holds_through_start_and_load() -> None:
    try:
        resolve_model("demo")
    except ModelNotFound as error:
        pytest.skip(str(error))
    figures = run(LOADED)
    assert figures["cap"] == 1100 * MIB
    assert figures["start"] <= figures["peak"] <= figures["cap"]
    assert figures["stats"]["num_output_tokens"] == 4 * 6 * 8
    held = figures["held"]
    assert max(held[1:]) - held[0] <= 2 * MIB, "it grows while serving"


def test_what_is_closed_is_given_back(tmp_path: Path) -> None:
    """Four engines one after the other in one process: the KV cache goes back each time and nothing adds up."""
    figures = run(CLOSED, str(write_small_model(tmp_path / "model")))
    assert figures["kv"] > 8 * MIB
    assert figures["given_back"] >= figures["kv"]
    assert figures["held"][-1] - figures["held"][1] <= 4 * MIB
