"""A hostile or clumsy user: advice that works when it is followed, and a context that really fits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

_CONFIG = {
    "model_type": "gemma3_text",
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "sliding_window": 32,
    "max_position_embeddings": 65536,
    "torch_dtype": "bfloat16",
}
_START = """
import sys
from brim import LLM, SamplingParams
from brim.errors import BrimError
try:
    with LLM(sys.argv[1], load_format="dummy", max_num_seqs=3, **dict(word.split("=") for word in sys.argv[2:])) as llm:
        length = llm.info["max_model_len"]
        llm.generate([[5] * (length - 1)], SamplingParams(max_tokens=1))
        print("started", length)
except BrimError as error:
    print("refused", error)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(_CONFIG))
    return tmp_path


def _start(model: Path, *settings: str) -> str:
    command = [sys.executable, "-c", _START, str(model), *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _named_mib(refused: str) -> int:
    found = re.search(r"--memory (\d+)MiB\.", refused)
    assert found, refused
    return int(found[1])


def test_the_memory_that_a_refusal_names_is_enough(model: Path) -> None:
    named = _named_mib(_start(model, "memory=1MiB"))
    assert _start(model, f"memory={named}MiB") == "started 4096\n"


def test_the_longest_context_that_fits_really_runs(model: Path) -> None:
    least = _named_mib(_start(model, "memory=1MiB", "max_model_len=auto"))
    lengths = [int(_start(model, f"memory={least + more}MiB", "max_model_len=auto").removeprefix("started ")) for more in (2, 8)]
    assert 2 < lengths[0] < lengths[1] < 65536
