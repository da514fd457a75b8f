"""Steps of a small model with random weights: however they run, the same tokens; what is not finite fails alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.small_models import EOS, VOCAB, write_small_model
from torch import Tensor

from brim.engine.messages import AddRequest, SequenceOutput
from brim.engine.sampling_params import SamplingParams
from brim.llm import LLM
from brim.worker.runner import ModelRunner
from brim.worker.step_inputs import StepArrays

POISONED = 7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("models") / "poisoned", poisoned_id=POISONED)


def start(model: Path, **settings: Any) -> LLM:
    return LLM(str(model), max_model_len=128, **{"max_num_seqs": 8, "max_num_batched_tokens": 64, **settings})


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    """Started after another engine ran in this process, so that what torch takes once for good is not charged to its cap."""
    with start(model, kernels="torch") as other:
        tokens(other, PARAMS[0])
    with start(model) as made:
        yield made


def prompt(number: int, length: int) -> list[int]:
    return np.random.default_rng(number).integers(POISONED + 1, VOCAB, length).tolist()


PROMPTS = [prompt(i, length) for i, length in enumerate((3, 40, 17, 90, 1, 33))]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=4, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=1.2, top_k=9, top_p=0.9, seed=5, max_tokens=12, ignore_eos=True),
]


def tokens(llm: LLM, params: list[SamplingParams] | SamplingParams) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params)]


@pytest.mark.parametrize("params", PARAMS, ids=["greedy", "seeded", "cut"])
def test_recorded_programs_give_the_tokens_of_single_calls(llm: LLM, model: Path, params: SamplingParams) -> None:
    assert llm.info["decode_programs"] == 16
    with start(model, enforce_eager=True) as eager:
        assert eager.info["decode_programs"] == 0
        assert tokens(eager, params) == tokens(llm, params)


def test_the_reference_kernels_give_the_same_tokens(llm: LLM, model: Path) -> None:
    with start(model, kernels="torch") as reference:
        assert reference.info["kernels"] == "torch"
        assert tokens(reference, PARAMS[0]) == tokens(llm, PARAMS[0])


def test_the_same_seed_gives_the_same_tokens_whatever_the_batch(llm: LLM) -> None:
    mixed = [PARAMS[i % 3] for i in range(len(PROMPTS))]
    together = tokens(llm, mixed)
    alone = [llm.generate([ids], params)[0].outputs[0].token_ids for ids, params in zip(PROMPTS, mixed, strict=True)]
    assert together == alone
    assert tokens(llm, PARAMS[1]) != tokens(llm, SamplingParams(temperature=0.9, seed=5, max_tokens=12, ignore_eos=True))


def test_special_rows_do_not_change_their_neighbours(llm: LLM) -> None:
    """A row with penalties and log-probabilities keeps its step off the recorded program; the others get what they got."""
    plain = tokens(llm, PARAMS[1])
    special = SamplingParams(temperature=0.9, seed=4, max_tokens=12, ignore_eos=True, logprobs=3, frequency_penalty=1.5)
    with_special = tokens(llm, [PARAMS[1]] * 5 + [special])
    assert with_special[:5] == plain[:5] and with_special[5] != plain[5]
    scored = tokens(llm, SamplingParams(temperature=0.9, seed=4, max_tokens=12, ignore_eos=True, logprobs=3))
    assert scored == plain, "asking for log-probabilities changed the tokens"


def test_min_tokens_bans_the_end_until_then(llm: LLM) -> None:
    """With a bias that always prefers the end, the first `min_tokens` tokens are others and the next one is the end."""
    params = SamplingParams(temperature=0, max_tokens=9, min_tokens=4, logit_bias={EOS: 100.0, 9: 90.0}, stop_token_ids=(9,))
    output = llm.generate([PROMPTS[0]], params)[0].outputs[0]
    assert len(output.token_ids) == 5 and output.token_ids[4] == EOS and not {EOS, 9} & set(output.token_ids[:4])
    assert output.finish_reason == "stop"


def test_what_is_not_finite_fails_alone(llm: LLM) -> None:
    """A prompt with the token whose embedding is NaN fails; those beside it, and the next ones in its blocks, do not."""
    expected = tokens(llm, PARAMS[0])
    poisoned = [*PROMPTS[1][:20], POISONED, *PROMPTS[1][20:]]
    outputs = llm.generate([PROMPTS[0], poisoned, *PROMPTS[2:]], PARAMS[0])
    assert [outputs[1].outputs[0].finish_reason, outputs[1].outputs[0].error_kind] == ["error", "RequestFailed"]
    assert "not finite" in (outputs[1].outputs[0].error or "")
    assert [o.outputs[0].token_ids for i, o in enumerate(outputs) if i != 1] == [t for i, t in enumerate(expected) if i != 1]
    assert tokens(llm, PARAMS[0]) == expected


def test_a_sampled_token_that_poisons_fails_alone_too(llm: LLM) -> None:
    """The same in a decode step, which runs as a recorded program."""
    forced = SamplingParams(temperature=0, max_tokens=8, logit_bias={POISONED: 100.0}, ignore_eos=True)
    outputs = llm.generate(PROMPTS[:3], [PARAMS[0], forced, PARAMS[0]])
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]
    assert outputs[1].outputs[0].token_ids == [POISONED]


def test_decode_steps_are_replayed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """`forward` runs for the prompt only."""
    calls: list[int] = []
    plain = ModelRunner.forward

    def counted(self: ModelRunner, arrays: StepArrays, **how: bool) -> tuple[Tensor, Tensor | None]:
        calls.append(arrays.num_tokens)
        return plain(self, arrays, **how)

    monkeypatch.setattr(ModelRunner, "forward", counted)
    llm.generate([PROMPTS[0]], PARAMS[0])
    assert calls == [len(PROMPTS[0])]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_last_layer_is_computed_for_sampled_rows_unless_prompts_are_scored(
    family: str, tmp_path: Path, steps: list[tuple[int, int]]
) -> None:
    """Chunks of prompts beside decodes, steps that sample nothing, batches with a scored prompt: the same tokens."""
    scored = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=1)
    with start(write_small_model(tmp_path / family, family), enforce_eager=True, enable_prefix_caching=False) as llm:
        assert (64, 64) in steps and all(wanted == count for count, wanted in steps), "a step may do more than was measured"
        steps.clear()
        trimmed = tokens(llm, PARAMS[0])
        assert all(wanted <= len(PROMPTS) for _, wanted in steps)
        assert any(1 < wanted < count for count, wanted in steps), "no chunk beside decodes"
        steps.clear()
        assert tokens(llm, [scored] * len(PROMPTS)) == trimmed
        mixed = [scored if i == 3 else PARAMS[0] for i in range(len(PROMPTS))]
        assert tokens(llm, mixed) == trimmed
        assert any(len(PROMPTS) < wanted == count for count, wanted in steps), "no prompt was scored"
        steps.clear()
        llm.generate([PROMPTS[3]], PARAMS[0])
        assert steps[:3] == [(64, 0), (26, 1), (1, 1)]


def test_prompt_logprobs_are_in_order_and_score_the_next_token(llm: LLM, model: Path) -> None:
    """Whole, and in chunks of 16 beside another request: the same numbers as a forward pass of the reference gives."""
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=2, ignore_eos=True)
    whole = llm.generate([PROMPTS[3]], params)[0].prompt_logprobs
    with start(model, max_num_batched_tokens=16) as chunked:
        parts = chunked.generate([PROMPTS[1], PROMPTS[3]], params)[1].prompt_logprobs
    assert whole is not None and whole == parts and len(whole) == len(PROMPTS[3]) and whole[0] is None
    for token, scores in zip(PROMPTS[3][1:], whole[1:], strict=True):
        assert scores is not None and scores.chosen.token_id == token
        best = [score.logprob for score in scores.top]
        assert best == sorted(best, reverse=True) and (scores.chosen.rank > 2) == (scores.chosen.logprob < best[1])
    one = llm.generate([[PROMPTS[3][0]]], params)[0].prompt_logprobs
    assert one == [None]


def test_tokens_of_the_core_without_text(llm: LLM) -> None:
    """The worker's outputs themselves: one token a step and a finish reason at the end."""
    core = llm._core
    core.add(AddRequest("r", PROMPTS[0], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True), 0.0))
    outputs: list[SequenceOutput] = []
    while core.has_work:
        outputs += core.step()
    assert [len(output.new_token_ids) for output in outputs] == [1, 1, 1]
    assert [output.finish_reason for output in outputs] == [None, None, "length"]
