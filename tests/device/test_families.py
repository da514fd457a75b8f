"""Small random models of every family on the device in bfloat16, beside `transformers` in float32 and in bfloat16 there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.small_models import write_tokenizer
from tests.unit.models.helpers import CONFIGS, MAX_LEN, VOCAB, hf_logits, random_model

from brim import LLM, SamplingParams

pytestmark = pytest.mark.device
PROMPT_LENGTHS = (140, 3, 61)
NEW_TOKENS = 24


@pytest.fixture(params=list(CONFIGS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    random_model(CONFIGS[request.param]()).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    yield tmp_path
    torch.cuda.empty_cache()


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(2, VOCAB, length).tolist() for length in PROMPT_LENGTHS]


def test_logits_and_greedy_tokens(folder: Path) -> None:
    """Log-probabilities are as near to float32 as those of `transformers` in bfloat16, within a factor of two; each greedy token
    is the best in float32 or within 0.1 of it."""
    from transformers import AutoModelForCausalLM

    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, prompt_logprobs=0)
    with LLM(str(folder), dtype="bfloat16", max_model_len=MAX_LEN, max_num_seqs=8, memory="2GiB", device="cuda") as llm:
        assert llm.info["kernels"] == "triton", llm.info["kernels_reason"]
        outputs = llm.generate(prompts(), params)
        plain = llm.generate(prompts(), SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True))
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().cuda()
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().cuda()
    ours_error, theirs_error = [], []
    for prompt, output, again in zip(prompts(), outputs, plain, strict=True):
        assert output.outputs[0].error is None and output.prompt_logprobs is not None
        ids = torch.tensor(prompt, device="cuda")
        log_probs = hf_logits(exact, ids).log_softmax(-1)
        their_log_probs = hf_logits(rounded, ids).float().log_softmax(-1)
        for position in range(1, len(prompt)):
            scores = output.prompt_logprobs[position]
            assert scores is not None
            true = log_probs[position - 1, prompt[position]].item()
            ours_error.append(abs(scores.chosen.logprob - true))
            theirs_error.append(abs(their_log_probs[position - 1, prompt[position]].item() - true))
        tokens = again.outputs[0].token_ids
        whole = hf_logits(exact, torch.tensor([*prompt, *tokens], device="cuda"))[len(prompt) - 1 : -1]
        lost = whole.max(-1).values - whole.gather(-1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]
        assert lost.max().item() < 0.1, f"a greedy token lies {lost.max().item():.3f} under the best"
    assert np.mean(ours_error) <= 2 * np.mean(theirs_error) + 1e-3
