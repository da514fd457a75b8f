"""`brim bench suite`: the arithmetic of its limits, its parts, and what it does when one fails."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.cli.conftest import MIB, Brim, FakeLLM

from brim.cli import bench_suite
from brim.cli.bench_figures import Work, figures_of, linear_shapes
from brim.cli.bench_server import write_tokenizer
from brim.cli.measure import EngineRun
from brim.config.model_spec import ModelSpec, spec_from_hf_config
from brim.errors import EngineError

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
    "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 1e4, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
KV = {"block_size": 16, "groups": [{"kind": "full", "window": 0, "block_bytes": 1600}]}
LIMITS = {"bandwidth_bytes_per_s": 1e9, "matmul_flops": 1e12, "linears_ms": {"tiny": {"1": 0.4}}}


@pytest.fixture
def spec() -> ModelSpec:
    return spec_from_hf_config(CONFIG)


def test_products_of_a_token_are_all_weights_but_norms_and_embedding(spec: ModelSpec) -> None:
    elements = sum(outputs * inputs * count for outputs, inputs, count in linear_shapes(spec))
    norms = (2 * spec.num_layers + 1) * spec.hidden_size
    assert elements == spec.num_parameters - norms - spec.vocab_size * spec.hidden_size


def test_attention_of_a_prompt_is_half_a_square_or_a_band(spec: ModelSpec) -> None:
    info = {"weight_bytes": 0}
    products = 2 * 10 * 3 * (128 * 64 + 64 * 64 + 256 * 64 + 64 * 128) + 2 * 1000 * 64
    assert Work(spec, info, KV).prefill_flops(10) == products + 4 * 4 * 16 * 3 * 55
    sliding = replace(spec, layer_kinds=("sliding", "sliding", "full"), sliding_window=4)
    pairs = 2 * (4 + 3 + 2 + 1 + 6 * 4) + 55
    assert Work(sliding, info, KV).prefill_flops(10) == products + 4 * 4 * 16 * pairs


def test_a_figure_stands_beside_its_limit_and_failed_parts_give_none(spec: ModelSpec) -> None:
    found: dict[str, Any] = {
        "info": {"weight_bytes": 2_000_000, "embedding_only_bytes": 500_000, "kv_tokens": 64}, "kv": KV, "host_memory": False,
        "decode": {"ms_per_token": {"1": 3.0, "8": 6.0}, "input_len": 128, "output_len": 1},
        "workload": {"name": "mixed-16", "num_seqs": 16, "tokens_per_s": 500.0, "seconds": 2.0},
        "server": {"tokens_per_s": 400.0, "num_clients": 16, "ready_s": 1.0},
        "prefill": {"failed": "no"},
        "memory": {"server": {"free_bytes": {"least": 5, "most": 9}, "resident_bytes": {"least": 1, "most": 1}}},
    }  # fmt: skip
    rows = {row["name"]: row for row in figures_of(spec, found, LIMITS, "tiny")}
    assert rows["decode, batch 1"]["limit"] == pytest.approx((1_500_000 + 144 * 100) / 1e9 * 1000)
    assert rows["decode, batch 8"]["limit_share"] == pytest.approx((1.5 + 8 * 0.0144) / 6)
    assert "0.40 ms" in rows["decode, batch 1"]["limit_is"]
    assert rows["the same, 16 clients over HTTP"]["limit_share"] == 0.8
    assert rows["free memory moved, server"]["value"] == 4
    assert not any(name.startswith("prefill") for name in rows)


def test_a_workloads_limit_reads_weights_once_a_step_and_its_growing_cache(spec: ModelSpec) -> None:
    moved, _, prefill = Work(spec, {"weight_bytes": 1000}, KV).workload_cost([(10, 2), (20, 3)])
    assert moved == 3 * 1000 + (10 + 11 + 20 + 21 + 22) * 100
    assert prefill > 0


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    folder = tmp_path / "shapes" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder.parent


def test_a_part_that_fails_is_recorded_and_the_others_go_on(
    brim_command: Brim, fake_llm: FakeLLM, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run_engine(model: str, settings: dict[str, Any], parts: Any, *, environment: dict[str, str]) -> EngineRun:
        asked.append(([part["part"] for part in parts], settings, environment["BRIM_CACHE_DIR"]))
        if not parts:
            raise EngineError("it died.")
        memory = {kind: {"first": 1, "least": 1, "most": 1} for kind in ("free_bytes", "resident_bytes")}
        done = {"decode": {"ms_per_token": {"1": 2.0}, "input_len": 128, "output_len": 4}}
        return EngineRun(1.5, 1.6, 7 * MIB, {**fake_llm.info, "kv_tokens": 64}, done, {**memory, "kv": KV})

    limits = {**LIMITS, "host_memory": True, "device": {"device": "a fake"}}
    monkeypatch.setattr(bench_suite, "run_engine", run_engine)
    monkeypatch.setattr(bench_suite, "measure_limits", lambda *_, **__: dict(limits))
    ended = brim_command("bench", "suite", "--models", str(shapes), "--parts", "start,decode", "--json", "--seed", "3")
    assert ended.code == 1
    record = json.loads(ended.out)
    found = record["models"]["tiny"]
    assert found["start_cold"] == {"failed": "it died."}
    assert found["start_second"]["ready_s"] == 1.5
    assert {row["name"] for row in found["figures"]} >= {"decode, batch 1", "start to ready, second start", "KV cache"}
    assert [parts for parts, _, _ in asked] == [[], ["decode"]]
    assert all(s["load_format"] == "dummy" and s["seed"] == "3" and not s["enable_prefix_caching"] for _, s, _ in asked)
    assert len({folder for *_, folder in asked}) == 1


def test_a_suite_that_is_cut_off_leaves_what_it_measured(
    brim_command: Brim, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def measure_limits(device: str, *_: Any, **__: Any) -> dict[str, Any]:
        asked.append(device)
        if len(asked) > 1:
            raise EngineError("it was cut off.")
        return {**LIMITS, "host_memory": True, "device": {"device": "a fake"}}

    monkeypatch.setattr(bench_suite, "run_engine", lambda *_, **__: EngineRun(1.5, 1.6, 7 * MIB, {}, {}, {"kv": KV}))
    monkeypatch.setattr(bench_suite, "measure_limits", measure_limits)
    ended = brim_command("bench", "suite", "--models", str(shapes), "--parts", "start", "--output", str(tmp_path / "record.json"))
    assert ended.code == 1 and "cut off" in ended.err
    assert json.loads((tmp_path / "record.json").read_text())["models"]["tiny"]["start_second"]["ready_s"] == 1.5


def test_an_unknown_part_is_said_before_anything_runs(brim_command: Brim, shapes: Path) -> None:
    ended = brim_command("bench", "suite", "--models", str(shapes), "--parts", "speed")
    assert ended.code == 1
    assert "no part 'speed'" in ended.err


def test_a_shape_that_no_model_here_has_is_left_out_and_said(tmp_path: Path) -> None:
    for name, changes in (("known", {}), ("other", {"model_type": "mixture", "architectures": ["MixtureForCausalLM"]})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    said: list[str] = []
    (subject,) = bench_suite.subjects_of([], tmp_path, {}, said.append)
    assert subject.name == "known" and len(said) == 1 and said[0].startswith("other is left out: ")


def test_nothing_to_measure_is_said(brim_command: Brim, tmp_path: Path) -> None:
    assert "--model" in brim_command("bench", "suite", "--models", str(tmp_path)).err


def test_every_id_of_the_written_tokenizer_is_a_word_of_its_own(tmp_path: Path) -> None:
    written = write_tokenizer(tmp_path, 2000) / "tokenizer.json"
    vocab = json.loads(written.read_text())["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(2000))
    assert all(word.startswith("Ġ") for word in vocab)
