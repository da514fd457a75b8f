"""What a start imports: every library costs its time in each engine process, and none may come back unnoticed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SHAPE = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 1e4, "torch_dtype": "float32", "tie_word_embeddings": False,
}  # fmt: skip
# What only a compiler, a front end, plans or other devices need.
NOT_IN_AN_ENGINE = {
    "brim.planning", "brim.platforms.scenario", "brim.worker.plan_preview", "brim.worker.scripted_run",
    "fastapi", "huggingface_hub", "matplotlib", "pandas", "prometheus_client", "pydantic", "rich", "scipy", "sympy",
    "torch._dynamo", "torch._inductor", "torch.onnx", "torch.utils.tensorboard", "torchvision", "transformers", "triton", "typer",
    "uvicorn",
}  # fmt: skip
NOT_IN_A_SERVER = {"torch", "numba", "scipy", "pandas", "transformers", "triton", "sympy", "huggingface_hub", "matplotlib"}


def imported_by(code: str, *arguments: str) -> set[str]:
    """Modules after this code, in a process of its own."""
    code += "\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_an_engine_imports_no_compiler_and_no_front_end(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    code = """
import sys
from brim.config.resolve import resolve
from brim.runtime import build_engine_core
settings = {"model": sys.argv[1], "load_format": "dummy", "device": "cpu", "max_num_seqs": 2, "memory": "1GiB"}
core, _ = build_engine_core(resolve(settings), lambda progress: None)
core.close()
"""
    found = imported_by(code, str(tmp_path))
    assert "torch" in found
    assert not found & NOT_IN_AN_ENGINE


@pytest.mark.parametrize("module", ["brim.cli.main", "brim.server.http_server", "brim.engine.launched_process"])
def test_a_server_imports_nothing_of_an_engine(module: str) -> None:
    assert not imported_by(f"import {module}") & NOT_IN_A_SERVER


def test_what_launches_an_engine_imports_next_to_nothing() -> None:
    found = imported_by("import brim.engine.launched_process")
    assert not found & {"asyncio", "numpy", "zmq"}
