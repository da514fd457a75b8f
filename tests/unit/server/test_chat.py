"""Conversations, whole and streamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.unit.server.conftest import Api
from tests.unit.server.letters import LetterFront

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "be fair"}, {"role": "user", "content": [{"type": "text", "text": "hello"}]}]


def ask(api: Api, **fields: Any) -> dict[str, Any]:
    answer = api.post(PATH, {"messages": MESSAGES, "temperature": 0, "ignore_eos": True, "max_tokens": 8, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_an_answer_has_openais_shape(api: Api) -> None:
    answer = ask(api, model="alias")
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "alias")
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert len(choice["message"]["content"]) == 8
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 8


def test_a_stream_says_whose_words_they_are_first(api: Api) -> None:
    text = ask(api)["choices"][0]["message"]["content"]
    fields = {"messages": MESSAGES, "max_tokens": 8, "stream_options": {"include_usage": True}}
    first, *events, last = api.stream(PATH, **fields)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["object"] == "chat.completion.chunk"
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == text
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * 7 + ["length"]
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 8


def test_n_answers_are_different_and_numbered(api: Api) -> None:
    fields = {"n": 3, "seed": 1, "temperature": 1}
    choices = ask(api, **fields)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    streamed = ["", "", ""]
    for event in api.stream(PATH, messages=MESSAGES, max_tokens=8, **fields):
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == [choice["message"]["content"] for choice in choices]
    assert len(set(streamed)) == 3


def test_logprobs_have_openais_shape(api: Api) -> None:
    answer = ask(api, logprobs=True, top_logprobs=2)
    scores = answer["choices"][0]["logprobs"]["content"]
    assert "".join(score["token"] for score in scores) == answer["choices"][0]["message"]["content"]
    assert all(bytes(score["bytes"]).decode() == score["token"] for score in scores)
    assert all(len(score["top_logprobs"]) == 2 for score in scores)
    assert ask(api, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert ask(api)["choices"][0]["logprobs"] is None


def test_without_max_tokens_the_context_is_the_limit(api: Api) -> None:
    answer = ask(api, max_tokens=None)
    assert answer["usage"]["total_tokens"] == 128
    assert ask(api, max_tokens=9, max_completion_tokens=3)["usage"]["completion_tokens"] == 3


def test_what_asks_for_nothing_is_accepted(api: Api) -> None:
    ask(api, tools=[], tool_choice="none", response_format={"type": "text"}, user="me", store=False, parallel_tool_calls=True)


def test_a_model_without_template_says_what_to_do(make_api: Callable[..., Api]) -> None:
    api = make_api(front=LetterFront(chat_template=None))
    error = api.refused(PATH, {"messages": MESSAGES})
    assert "--chat-template" in error["message"]
    assert error["code"] == "no_chat_template"


def test_a_template_that_refuses_is_the_requests_fault(api: Api) -> None:
    error = api.refused(PATH, {"messages": [{"role": "rogue", "content": "hi"}]})
    assert error["param"] == "messages"
