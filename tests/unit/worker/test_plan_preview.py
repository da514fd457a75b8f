"""`brim plan`'s document: against a record of real starts, against refusals of real starts, several models, ranks, changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from brim.config.resolve import resolve
from brim.config.schema import BrimConfig
from brim.errors import ConfigError, MemoryBudgetError, UnsupportedModel
from brim.planning import plan_starts
from brim.platforms.fake import FakeDevice, FakePlatform
from brim.platforms.scenario_shapes import SHAPES
from brim.runtime import EngineParts, build_engine_core
from brim.units import GIB, MIB

RECORDS = Path(__file__).parents[3] / "benchmarks/results"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIM_CACHE_DIR", str(tmp_path / "cache"))


def shape(folder: Path, name: str, **changes: Any) -> str:
    """A folder that holds nothing but a config.json."""
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "config.json").write_text(json.dumps({**SHAPES[name], "torch_dtype": "bfloat16", **changes}))
    return str(folder / name)


def config(model: str, **settings: Any) -> BrimConfig:
    return resolve({"model": model, **settings})


def plan(model: str, device: str = "h100-80g", **settings: Any) -> dict[str, Any]:
    (found,) = plan_starts([config(model, **settings)], [device])["plans"]
    return dict(found)


def fake_parts(total_bytes: int = 16 * GIB) -> EngineParts:
    return EngineParts(detect=lambda name: FakePlatform(FakeDevice(total_bytes=total_bytes)))


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-0.6b"])
@pytest.mark.parametrize("memory", ["max", "90%"])
def test_plans_agree_with_starts_on_an_h100(tmp_path: Path, name: str, memory: str) -> None:
    if memory == "max":
        real = json.loads((RECORDS / "suite_h100.json").read_text())["models"][name]["info"]
        weight_bytes = real["weight_bytes"]
    else:
        real = json.loads((RECORDS / "cuda_memory_h100.json").read_text())["parts"]["cap"][name]
        weight_bytes = next(line["bytes"] for line in real["report"]["ledger"] if line["category"] == "weights")
    found = plan(shape(tmp_path, name), max_model_len=8192, max_num_seqs=256, memory=memory)
    assert found["cap_bytes"] == real["cap_bytes"]
    assert abs(found["kv_tokens"] - real["kv_tokens"]) / real["kv_tokens"] < 0.001
    assert found["bytes"]["weights"] == weight_bytes


@pytest.mark.parametrize("mode", ["NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"])
def test_plans_agree_in_every_graph_mode(tmp_path: Path, mode: str) -> None:
    real = json.loads((RECORDS / "cuda_memory_h100.json").read_text())["parts"]["modes"][mode]
    model = shape(tmp_path, "qwen3-0.6b")
    found = plan(model, max_model_len=8192, max_num_seqs=256, memory="20GiB", graph_mode=mode)
    assert found["graph_mode"] == mode
    assert abs(found["kv_tokens"] - real["kv_tokens"]) / real["kv_tokens"] < 0.003


def test_a_plan_refuses_in_the_words_of_a_start(tmp_path: Path) -> None:
    model = shape(tmp_path, "llama-3.1-8b")
    (found,) = plan_starts([config(model)], ["this"], fake_parts())["plans"]
    with pytest.raises(MemoryBudgetError) as caught:
        build_engine_core(config(model, load_format="dummy"), lambda progress: None, parts=fake_parts())
    assert found["fits"] is False
    assert found["refused"]["message"] == str(caught.value)
    assert found["refused"]["nearest"] == list(caught.value.nearest)
    held = {(line.category, line.owner): line.num_bytes for line in caught.value.ledger.lines}  # type: ignore[union-attr]
    assert {(x["category"], x["owner"]): x["bytes"] for x in found["refused"]["ledger"]["ledger"]} == held


def test_what_a_refusal_names_fits(tmp_path: Path) -> None:
    model = shape(tmp_path, "llama-3.1-8b")
    refused = plan(model, "rtx4090-24g", max_model_len=131_072)["refused"]
    length = int(refused["nearest"][0].removeprefix("--max-model-len "))
    assert plan(model, "rtx4090-24g", max_model_len=length)["fits"]
    assert plan(model, "rtx4090-24g", max_model_len="auto")["max_model_len"] >= length


def test_the_longest_context_and_no_longer(tmp_path: Path) -> None:
    model = shape(tmp_path, "llama-3.1-8b")
    longest = plan(model, "rtx4090-24g", max_model_len=4096)["longest_context"]["tokens"]
    assert plan(model, "rtx4090-24g", max_model_len=longest)["fits"]
    assert not plan(model, "rtx4090-24g", max_model_len=longest + 1)["fits"]
    assert plan(model, "h100-80g")["longest_context"] == {"tokens": 131_072, "is_the_models_limit": True, "why": ""}


def test_each_change_is_the_plan_with_its_flags(tmp_path: Path) -> None:
    model = shape(tmp_path, "qwen3-0.6b")
    found = plan(model)
    assert {"batch tokens", "sequences", "longest context", "graphs", "dtype, KV included", "KV block"} <= {
        change["setting"] for change in found["changes"]
    }
    for change in found["changes"]:
        words = change["flags"].split()
        settings = {words[i][2:].replace("-", "_"): words[i + 1] for i in range(0, len(words), 2)}
        again = plan(model, **settings)
        assert again["kv_tokens"] == change["kv_tokens"], change["flags"]
        assert again["kv_tokens"] - found["kv_tokens"] == change["delta_kv_tokens"]
    assert found["best_change"]["delta_kv_tokens"] == max(change["delta_kv_tokens"] for change in found["changes"])


def test_more_memory_is_the_best_change_where_only_enough_is_taken(tmp_path: Path) -> None:
    found = plan(shape(tmp_path, "qwen3-0.6b"), "cpu:16GiB")
    assert found["memory"] == "enough" and found["best_change"]["flags"] == "--memory max"


def test_ranks_hold_their_part(tmp_path: Path) -> None:
    found = plan(shape(tmp_path, "llama-3.1-70b"), "a100-80g", max_model_len=8192)
    one, two, four, eight = found["tensor_parallel"]
    assert not found["fits"] and one["refused"] and not two["refused"], "131 GiB of weights"
    assert two["kv_tokens"] < four["kv_tokens"] < eight["kv_tokens"]
    assert four["weight_bytes"] == pytest.approx(2 * eight["weight_bytes"], rel=0.01)
    assert [rank["runs_today"] for rank in (one, two, four, eight)] == [True, False, False, False]
    odd = plan(shape(tmp_path, "qwen2-7b"))["tensor_parallel"]
    assert "28 attention heads cannot be divided over 8" in odd[3]["refused"] and not odd[2]["refused"]


def test_several_models_share_a_device(tmp_path: Path) -> None:
    models = [config(shape(tmp_path, name), max_model_len=8192) for name in ("llama-3.1-8b", "qwen3-0.6b")]
    found = plan_starts(models, ["h100-80g"])["plans"]
    assert all(one["fits"] for one in found)
    total = sum(one["share_bytes"] for one in found)
    assert 85_017_493_504 - 9_240_576 - 256 * MIB - 4 * MIB <= total <= 85_017_493_504 - 9_240_576 - 256 * MIB
    for one in found:
        alone = plan(one["model"], memory=f"{one['share_bytes'] // MIB}MiB", max_model_len=8192)
        assert alone["kv_tokens"] == one["kv_tokens"], "the flag that is shown gives the plan that is shown"
        assert "memory" not in {change["setting"] for change in one["changes"]}, "the rest is the other model's"
    with pytest.raises(MemoryBudgetError, match="do not fit together"):
        plan_starts([models[0], models[0]], ["rtx4090-24g"])
    with pytest.raises(ConfigError, match="share"):
        plan_starts([config(m.model.model, memory="10GiB") for m in models], ["h100-80g"])


def test_an_architecture_that_cannot_be_accounted_for_is_refused(tmp_path: Path) -> None:
    model = shape(tmp_path, "llama-3.1-8b", model_type="mamba2")
    with pytest.raises(UnsupportedModel, match="mamba2"):
        plan(model)


def test_weights_need_not_be_there(tmp_path: Path) -> None:
    folder = Path(shape(tmp_path, "qwen3-0.6b"))
    alone = plan(str(folder))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-1.safetensors"}}))
    assert plan(str(folder))["kv_tokens"] == alone["kv_tokens"]
    assert plan(str(folder / "config.json"))["kv_tokens"] == alone["kv_tokens"]
    (folder / "model-1.safetensors").write_bytes(b"")
    assert plan(str(folder / "model-1.safetensors"))["kv_tokens"] == alone["kv_tokens"]


def test_a_profile_predicts_only_where_nothing_was_measured(tmp_path: Path) -> None:
    model = shape(tmp_path, "qwen3-0.6b")
    for device, known in (("h100-80g", "measured"), ("h200-141g", "predicted")):
        found = plan(model, device)
        context = next(line for line in found["plan"]["ledger"] if line["category"] == "context")
        assert (found["device_known"], context["known_by"]) == (known, known)
