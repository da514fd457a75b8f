"""`LLM` over small random models in float32: the same tokens however the engine batches, cuts, preempts or reuses prompts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.small_models import EOS, VOCAB, write_small_model

from brim import LLM, SamplingParams
from brim.engine.step import StepPlan
from brim.errors import (
    BrimError,
    ConfigError,
    InvalidParameter,
    MemoryBudgetError,
    ModelNotFound,
    OutOfDeviceMemory,
    PromptTooLong,
    RequestError,
)

MAX_LEN = 320
SIZES = {"max_model_len": MAX_LEN, "max_num_seqs": 8, "max_num_batched_tokens": 512}
LENGTHS = (3, 150, 41, 90, 1, 260, 17, 64, 33, 200)
PROMPTS = [np.random.default_rng(i).integers(0, 256, length).tolist() for i, length in enumerate(LENGTHS)]
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, seed=7, top_p=0.95, max_tokens=40, ignore_eos=True)
MIXED = [GREEDY if i % 2 else SEEDED for i in range(len(PROMPTS))]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), **SIZES) as made:
        yield made


@pytest.fixture
def fresh(folder: Path) -> Iterator[LLM]:
    """For tests that change its cache."""
    with LLM(str(folder), **SIZES) as made:
        yield made


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    """One request at a time, without prefix caching."""
    with LLM(str(folder), **SIZES, enable_prefix_caching=False) as alone:
        return [alone.generate([p], params)[0].outputs[0].token_ids for p, params in zip(PROMPTS, MIXED, strict=True)]


def tokens(llm: LLM, prompts: list[Any] = PROMPTS, params: Any = MIXED) -> list[list[int]]:
    outputs = llm.generate(prompts, params)
    assert all(output.outputs[0].error is None for output in outputs), outputs
    return [output.outputs[0].token_ids for output in outputs]


# -- the same tokens


def test_the_ids_of_a_prompt_may_lie_in_an_array(llm: LLM) -> None:
    (listed,), (output,) = tokens(llm, [PROMPTS[0]], [GREEDY]), llm.generate([np.array(PROMPTS[0])], GREEDY)
    assert output.outputs[0].token_ids == listed
    assert output.prompt_token_ids == PROMPTS[0] and {type(i) for i in output.prompt_token_ids} == {int}


def test_the_tokens_depend_on_their_prompt(expected: list[list[int]]) -> None:
    """Otherwise all of this would prove nothing."""
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS)
    assert all(len(set(ids)) > 10 for ids in expected)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_seqs": 3},
        {"max_num_batched_tokens": 16},
        {"max_num_batched_tokens": 37, "max_num_seqs": 5},
        {"block_size": 8},
        {"enable_prefix_caching": False},
        {"enable_chunked_prefill": False},
        {"enforce_eager": True},
        {"num_threads": 1},
    ],
    ids=str,
)
def test_batches_and_chunks(folder: Path, expected: list[list[int]], settings: dict[str, Any]) -> None:
    with LLM(str(folder), **{**SIZES, **settings}) as llm:
        assert tokens(llm) == expected
        assert tokens(llm, PROMPTS[::-1], MIXED[::-1]) == expected[::-1]
        llm._core.scheduler.check_integrity()


def test_preemption(fresh: LLM, expected: list[list[int]]) -> None:
    """A cache of the longest request and a little more: eight sequences take turns in it."""
    core = fresh._core
    few = tuple(min(count, MAX_LEN // 16 + 2) for count in core.scheduler.blocks.num_blocks)
    core.executor.copy_blocks(core.scheduler.resize(few))
    assert tokens(fresh) == expected
    assert core.stats()["num_preemptions"] >= 2
    core.scheduler.check_integrity()


def test_steps_out_of_memory(fresh: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that fail for lack of memory, some after they ran, shrink the cache and are taken again."""
    core = fresh._core
    plain, calls = core.executor.submit, [0]

    def failing(plan: StepPlan) -> Any:
        calls[0] += 1
        if calls[0] % 7 == 3:
            raise OutOfDeviceMemory("pretended")
        result = plain(plan)
        if calls[0] % 11 == 5:
            raise OutOfDeviceMemory("pretended, afterwards")
        return result

    monkeypatch.setattr(core.executor, "submit", failing)
    assert tokens(fresh) == expected
    assert core.stats()["num_out_of_memory"] >= 10 and core.stats()["num_kv_shrinks"] >= 1
    core.scheduler.check_integrity()


def test_the_smallest_memory_that_fits_serves_all(folder: Path, expected: list[list[int]]) -> None:
    """The refusal names a size; with it, requests wait and are preempted, and get the same tokens."""
    sizes = {**SIZES, "max_num_seqs": 8, "block_size": 16}
    memory = "64MiB"
    for _ in range(5):  # this process may grow between the refusal and the next try
        try:
            with LLM(str(folder), **sizes, memory=memory) as llm:
                assert tokens(llm) == expected
                return
        except MemoryBudgetError as error:
            assert error.nearest and error.nearest[0].startswith("--memory "), error
            memory = error.nearest[0].removeprefix("--memory ")
    pytest.fail(f"none of five suggestions fitted, the last was {memory}")


def test_prefix_hits(fresh: LLM, expected: list[list[int]]) -> None:
    """The second time the whole blocks of each prompt are found, and so is a shared beginning; the tokens stay."""
    for prompt, params, ids in zip(PROMPTS, MIXED, expected, strict=True):
        for cached in (0, (len(prompt) - 1) // 16 * 16):
            output = fresh.generate([prompt], params)[0]
            assert (output.outputs[0].token_ids, output.usage.cached_tokens) == (ids, cached)
    longer = [[*PROMPTS[5][:100], *PROMPTS[i][:20]] for i in range(3)]
    fresh.generate([PROMPTS[5]], GREEDY)
    hits = fresh.generate(longer, GREEDY)
    print([output.usage.cached_tokens for output in hits])
    fresh._core.scheduler.blocks.forget_cached()
    misses = fresh.generate(longer[::-1], GREEDY)[::-1]
    assert [o.outputs[0].token_ids for o in hits] == [o.outputs[0].token_ids for o in misses]


def test_prompt_logprobs_do_not_depend_on_hits_or_preemption(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=3, ignore_eos=True)
    first = llm.generate([PROMPTS[3]], params)[0].prompt_logprobs
    again = llm.generate([PROMPTS[i] for i in (5, 3, 1)], params)[1].prompt_logprobs
    assert first == again and first is not None and len(first) == 90


# -- what a request may ask


def test_n_completions(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)
    output = llm.generate([PROMPTS[2]], params)[0]
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 3
    assert (output.usage.prompt_tokens, output.usage.completion_tokens) == (41, 36)
    assert llm.generate([PROMPTS[2]], params)[0].outputs == output.outputs
    assert llm.generate([PROMPTS[2]], SamplingParams(n=2, temperature=0, max_tokens=4))[0].outputs[1].index == 1


def test_seeds(llm: LLM) -> None:
    def sampled(seed: int | None) -> list[int]:
        return tokens(llm, [PROMPTS[2]], SamplingParams(seed=seed, max_tokens=20, ignore_eos=True))[0]

    assert sampled(1) == sampled(1) != sampled(2)
    assert sampled(None) != sampled(None), "without a seed every request draws its own"
    assert sampled(-5) == sampled(-5)


def test_logprobs(llm: LLM) -> None:
    """All of the vocabulary's first 20 add up to less than one; the greedy token is the best; the sampled one has its rank."""
    output = llm.generate([PROMPTS[2]], SamplingParams(temperature=0, max_tokens=8, logprobs=20, ignore_eos=True))[0].outputs[0]
    assert output.logprobs is not None and len(output.logprobs) == 8
    for token, scores in zip(output.token_ids, output.logprobs, strict=True):
        assert scores.chosen.token_id == token == scores.top[0].token_id and scores.chosen.rank == 1
        values = [score.logprob for score in scores.top]
        assert values == sorted(values, reverse=True) and 0 < np.exp(values).sum() <= 1 + 1e-5
    params = SamplingParams(temperature=2.0, seed=1, max_tokens=8, logprobs=0, ignore_eos=True)
    sampled = llm.generate([PROMPTS[2]], params)[0].outputs[0]
    scored = llm.generate([[*PROMPTS[2], *sampled.token_ids]], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))[
        0
    ].prompt_logprobs
    assert sampled.logprobs is not None and scored is not None
    for given, again in zip(sampled.logprobs, scored[-8:], strict=True):
        assert again is not None and given.top == []
        assert given.chosen.logprob == pytest.approx(again.chosen.logprob, abs=1e-4), "of the model, not of the temperature"
        assert given.chosen.rank == again.chosen.rank


def test_stop_strings_tokens_and_the_end(llm: LLM) -> None:
    plain = llm.generate([PROMPTS[2]], GREEDY)[0].outputs[0]
    stop = next(pair for pair in (plain.text[i : i + 2] for i in range(5, 30)) if "�" not in pair)
    found = plain.text.index(stop)
    output = llm.generate([PROMPTS[2]], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=stop))[0].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == (plain.text[:found], "stop", stop)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=(stop,), include_stop_str_in_output=True)
    assert llm.generate([PROMPTS[2]], params)[0].outputs[0].text == plain.text[: found + len(stop)]
    token = plain.token_ids[5]
    first = plain.token_ids.index(token)
    output = llm.generate([PROMPTS[2]], SamplingParams(temperature=0, max_tokens=40, stop_token_ids=token))[0].outputs[0]
    assert (output.token_ids, output.stop_reason) == (plain.token_ids[: first + 1], token)
    ended = llm.generate([PROMPTS[2]], SamplingParams(temperature=0, logit_bias={EOS: 100.0}))[0].outputs[0]
    assert (ended.token_ids, ended.text, ended.finish_reason, ended.stop_reason) == ([EOS], "", "stop", None)


def test_streaming_is_generate_in_pieces(llm: LLM) -> None:
    for params in (GREEDY, SEEDED, SamplingParams(temperature=0, max_tokens=30, logprobs=2, n=2)):
        whole = llm.generate([PROMPTS[3]], params)[0]
        chunks = list(llm.stream(PROMPTS[3], params))
        assert [chunk.is_last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        for completion in whole.outputs:
            mine = [chunk for chunk in chunks if chunk.index == completion.index]
            assert "".join(chunk.text for chunk in mine) == completion.text
            assert [token for chunk in mine for token in chunk.token_ids] == completion.token_ids
            assert [score for chunk in mine for score in chunk.logprobs or []] == (completion.logprobs or [])
            assert mine[-1].finish_reason == completion.finish_reason
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_an_iterator_that_is_closed_cancels_its_request(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[3], GREEDY)
    next(stream)
    assert llm.stats()["running"] == 1
    stream.close()
    assert llm.stats()["running"] == 0
    llm._core.scheduler.check_integrity()


def test_text_and_ids_are_the_same_prompt(llm: LLM) -> None:
    text = "Streams of bytes: 東京 🎉\n"
    by_text = llm.generate(text, GREEDY)[0]
    assert by_text.prompt == text and by_text.prompt_token_ids == llm.tokenizer.encode(text, True)
    assert llm.generate(by_text.prompt_token_ids, GREEDY)[0].outputs == by_text.outputs


# -- what is refused


@pytest.mark.parametrize(
    ("prompt", "params", "error", "text"),
    [
        ([], None, InvalidParameter, "empty"),
        ([1] * MAX_LEN, None, PromptTooLong, str(MAX_LEN)),
        ([VOCAB], None, InvalidParameter, f"{VOCAB} is outside"),
        ([-1], None, InvalidParameter, "-1"),
        ([1, 2], {"logit_bias": {VOCAB: 1.0}}, InvalidParameter, "logit_bias"),
        ([1, 2], {"stop_token_ids": (VOCAB,)}, InvalidParameter, "stop_token_ids"),
        ("a\ud800b", None, RequestError, "surrogate|Unicode|text"),
    ],
    ids=["empty", "long", "id", "negative", "bias", "stop", "text"],
)
def test_requests_that_are_refused(
    llm: LLM, prompt: Any, params: dict[str, Any] | None, error: type[RequestError], text: str
) -> None:
    """One alone raises; the engine goes on. Beside others it ends with an error and they do not."""
    chosen = SamplingParams(**{"temperature": 0, "max_tokens": 4, **(params or {})})
    with pytest.raises(error, match=text):
        llm.generate([prompt], chosen)
    with pytest.raises(error, match=text):
        list(llm.stream(prompt, chosen))
    if not isinstance(prompt, str):
        outputs = llm.generate([[1, 2], prompt, [3]], [GREEDY, chosen, GREEDY])
        assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]
    assert llm.stats()["running"] == llm.stats()["waiting"] == 0


def test_an_empty_text_and_no_prompts(llm: LLM) -> None:
    with pytest.raises(InvalidParameter, match="empty"):
        llm.generate("", GREEDY)
    assert llm.generate([], GREEDY) == []
    with pytest.raises(InvalidParameter, match="2 prompts but 1"):
        llm.generate([[1], [2]], [GREEDY])


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"max_num_sequences": 4}, ConfigError, "max_num_seqs"),
        ({"max_model_len": 513}, ConfigError, "512"),
        ({"max_num_seqs": 0}, ConfigError, "max_num_seqs|max-num-seqs"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, ConfigError, "--max-num-batched-tokens 32"),
        ({"dtype": "int8"}, ConfigError, "int8"),
        ({"memory": "1MiB"}, MemoryBudgetError, "Settings that would fit"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 100}, ConfigError, "chunked prefill"),
    ],
    ids=str,
)
def test_settings_that_are_refused(folder: Path, settings: dict[str, Any], error: type[BrimError], text: str) -> None:
    threads = threading.active_count()
    with pytest.raises(error, match=text):
        LLM(str(folder), **settings)
    assert threading.active_count() == threads, "a thread was left behind"


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="nothing-here"):
        LLM(str(tmp_path / "nothing-here"))


def test_a_seed_of_the_engine_repeats_requests_without_their_own(folder: Path) -> None:
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    runs = []
    for seed in (1, 1, 2):
        with LLM(str(folder), **SIZES, seed=seed) as llm:
            runs.append(tokens(llm, PROMPTS[:3], params))
    assert runs[0] == runs[1] != runs[2]
