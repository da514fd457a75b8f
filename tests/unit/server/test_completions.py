"""Text completions, whole and streamed."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.server.conftest import Api
from tests.unit.server.letters import BOS, EOS, LetterTokenizer

PATH = "/v1/completions"


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def test_a_completion_has_openais_shape(api: Api) -> None:
    answer = api.complete("hello", max_tokens=5)
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["model"] == "letters"
    (choice,) = answer["choices"]
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert len(choice["text"]) == 5
    details = {"cached_tokens": 0}
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 5, "total_tokens": 11, "prompt_tokens_details": details}


def test_a_stream_says_what_a_whole_answer_says(api: Api) -> None:
    whole = api.complete("hello", max_tokens=12)
    events = api.stream(PATH, prompt="hello", max_tokens=12)
    assert "".join(event["choices"][0]["text"] for event in events) == texts(whole)[0]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert all("usage" not in event for event in events)
    assert len({event["id"] for event in events}) == 1


def test_a_stream_ends_with_its_usage_where_asked(api: Api) -> None:
    events = api.stream(PATH, prompt="hello", max_tokens=3, stream_options={"include_usage": True})
    assert [event["usage"] for event in events[:-1]] == [None] * 3
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 3
    events = api.stream(PATH, prompt="hello", max_tokens=3, stream_options={"continuous_usage_stats": True})
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3]


def test_prompts_of_every_form(api: Api) -> None:
    ids = LetterTokenizer().encode("hello")
    one = texts(api.complete("hello"))
    other = texts(api.complete("world"))
    assert texts(api.complete(ids)) == one
    assert texts(api.complete(["hello", "world"])) == one + other
    assert texts(api.complete([ids, LetterTokenizer().encode("world")])) == one + other
    assert texts(api.complete(ids[1:], add_special_tokens=False)) == texts(api.complete("hello", add_special_tokens=False))


def test_choices_of_several_prompts_and_n_are_numbered_through(api: Api) -> None:
    fields = {"n": 2, "seed": 7, "temperature": 1, "max_tokens": 6}
    whole = api.complete(["hello", "world"], **fields)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert len(set(texts(whole))) == 4
    streamed = ["", "", "", ""]
    for event in api.stream(PATH, prompt=["hello", "world"], **fields):
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == texts(whole)
    assert whole["usage"]["prompt_tokens"] == 12
    assert whole["usage"]["completion_tokens"] == 24


def test_a_seed_gives_the_same_text(api: Api) -> None:
    first = api.complete("hello", seed=3, temperature=1)
    assert texts(api.complete("hello", seed=3, temperature=1)) == texts(first)
    assert texts(api.complete("hello", seed=4, temperature=1)) != texts(first)


def test_stop_strings_end_the_text(api: Api) -> None:
    text = texts(api.complete("hello", max_tokens=20))[0]
    stop = text[6:8]
    expected = text[: text.index(stop)]
    answer = api.complete("hello", max_tokens=20, stop=stop)
    assert texts(answer) == [expected]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["stop_reason"] == stop
    included = api.complete("hello", max_tokens=20, stop=["never there", stop], include_stop_str_in_output=True)
    assert texts(included) == [expected + stop]
    events = api.stream(PATH, prompt="hello", max_tokens=20, stop=[stop])
    assert "".join(event["choices"][0]["text"] for event in events) == expected


def test_stop_token_ids_name_their_token(api: Api) -> None:
    text = texts(api.complete("hello", max_tokens=20))[0]
    token = LetterTokenizer().encode(text[4], False)[0]
    answer = api.complete("hello", max_tokens=20, stop_token_ids=[token])
    assert answer["choices"][0]["stop_reason"] == token
    assert texts(answer) == [text[: text.index(text[4])]]


def test_echo_puts_the_prompt_first(api: Api) -> None:
    text = texts(api.complete("hello"))[0]
    assert texts(api.complete("hello", echo=True)) == ["hello" + text]
    assert texts(api.complete(LetterTokenizer().encode("hello"), echo=True)) == ["hello" + text]
    events = api.stream(PATH, prompt="hello", echo=True)
    assert "".join(event["choices"][0]["text"] for event in events) == "hello" + text


@pytest.mark.parametrize("stream", [False, True])
def test_echo_without_new_tokens_scores_the_prompt(api: Api, stream: bool) -> None:
    fields = {"echo": True, "max_tokens": 0, "logprobs": 2}
    if stream:
        *events, last = api.stream(PATH, prompt="hello", stream_options={"include_usage": True}, **fields)
        choice, usage = events[0]["choices"][0], last["usage"]
        assert len(events) == 1
    else:
        answer = api.complete("hello", **fields)
        choice, usage = answer["choices"][0], answer["usage"]
    assert choice["text"] == "hello"
    assert usage["completion_tokens"] == 0
    scores = choice["logprobs"]
    assert scores["tokens"] == ["", *"hello"]
    assert scores["token_logprobs"][0] is None
    assert scores["top_logprobs"][0] is None
    assert scores["text_offset"] == [0, 0, 1, 2, 3, 4]


def test_logprobs_have_openais_shape(api: Api) -> None:
    answer = api.complete("hello", max_tokens=4, logprobs=3)
    scores = answer["choices"][0]["logprobs"]
    assert "".join(scores["tokens"]) == texts(answer)[0]
    assert scores["text_offset"] == [0, 1, 2, 3]
    assert all(-1 <= value < 0 for value in scores["token_logprobs"])
    assert all(len(best) == 3 for best in scores["top_logprobs"])
    events = api.stream(PATH, prompt="hello", max_tokens=4, logprobs=3)
    streamed = [event["choices"][0]["logprobs"] for event in events]
    assert [offset for part in streamed for offset in part["text_offset"]] == [0, 1, 2, 3]
    assert [token for part in streamed for token in part["tokens"]] == scores["tokens"]


def test_prompt_logprobs_are_vllms(api: Api) -> None:
    found = api.complete("hey", prompt_logprobs=1)["choices"][0]["prompt_logprobs"]
    assert found[0] is None
    assert len(found) == 4
    assert {"logprob", "rank", "decoded_token"} == set(next(iter(found[1].values())))


def test_sampling_fields_reach_the_engine(api: Api) -> None:
    api.complete(
        "hello", temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.2, min_tokens=2,
        frequency_penalty=0.3, logit_bias={"5": 1.5}, stop=["x"], stop_token_ids=[9], ignore_eos=True, max_tokens=4,
        skip_special_tokens=False, priority=3, user="me", metadata={"a": "b"},
    )  # fmt: skip
    (params,) = api.engine.seen
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 5, 0.1)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.1, 0.2, 0.3)
    assert (params.logit_bias, params.stop, params.stop_token_ids, params.min_tokens) == ({5: 1.5}, ("x",), (9,), 2)
    assert (params.ignore_eos, params.skip_special_tokens, params.max_tokens) == (True, False, 4)
    assert api.engine.priorities == [3]


def test_nothing_asked_means_openais_defaults(api: Api) -> None:
    assert api.post(PATH, {"prompt": "hello", "max_tokens": None, "temperature": None, "stop": None}).status_code == 200
    (params,) = api.engine.seen
    assert (params.temperature, params.max_tokens, params.n, params.stop) == (1.0, 16, 1, ())


def test_special_tokens_are_shown_where_asked(api: Api) -> None:
    prompt = [BOS, EOS]
    assert texts(api.complete(prompt, echo=True, max_tokens=0)) == [""]
