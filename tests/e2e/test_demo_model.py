"""The demo model's greedy tokens are those of `transformers`, recorded by scripts/record_demo_tokens.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from brim import LLM, SamplingParams
from brim.errors import ModelNotFound
from brim.formats.model_files import resolve_model

FIXTURE = json.loads(Path(__file__).with_name("demo_tokens.json").read_text(encoding="utf-8"))
CASES: list[dict[str, Any]] = FIXTURE["cases"]
NEW_TOKENS = 48
SURE_GAP = 0.1  # of two logits, beyond which bfloat16 must agree with float32


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def demo(request: pytest.FixtureRequest) -> Iterator[LLM]:
    """As small as 31 short requests allow."""
    try:
        resolve_model("demo")
    except ModelNotFound as error:
        pytest.skip(str(error))
    with LLM("demo", dtype=request.param, max_model_len=256, max_num_seqs=16, max_num_batched_tokens=256) as llm:
        yield llm


def test_the_fixture_has_what_it_says() -> None:
    assert len(CASES) >= 20 and all(len(case["ids"]) == len(case["gaps"]) == NEW_TOKENS for case in CASES)
    assert {"transformers", "torch", "gguf"} <= set(FIXTURE["versions"])


def test_prompts_are_encoded_as_recorded(demo: LLM) -> None:
    for case in CASES:
        assert demo.tokenizer.encode(case["prompt"], True) == case["prompt_ids"], case["prompt"]


def test_greedy_tokens(demo: LLM) -> None:
    """In float32 token for token, in batches of up to 16 prompts. In bfloat16 (prompt and answer scored in one pass) the same
    best token wherever the gap to the second leaves no doubt."""
    if demo.info["dtype"] == "float32":
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        outputs = demo.generate([case["prompt"] for case in CASES], params)
        for case, output in zip(CASES, outputs, strict=True):
            assert output.outputs[0].token_ids == case["ids"], case["prompt"]
        return
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    outputs = demo.generate([[*case["prompt_ids"], *case["ids"]] for case in CASES], params)
    doubtful = []
    for case, output in zip(CASES, outputs, strict=True):
        assert output.prompt_logprobs is not None
        for position, (gap, scores) in enumerate(zip(case["gaps"], output.prompt_logprobs[-NEW_TOKENS:], strict=True)):
            assert scores is not None
            if scores.chosen.rank != 1:
                doubtful.append((gap, case["prompt"], position))
    print(f"{len(doubtful)} of {len(CASES) * NEW_TOKENS} differ, the largest gap {max(doubtful, default=(0.0,))[0]}")
    assert [case for case in doubtful if case[0] > SURE_GAP] == []
