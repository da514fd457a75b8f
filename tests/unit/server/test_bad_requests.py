"""Whatever a client sends, it gets one clear error in OpenAI's shape, and the next request is served."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.unit.server.conftest import CONFIG, Api
from tests.unit.server.letters import LetterFront


@dataclass(frozen=True)
class ThreadFront(LetterFront):
    """Notes where it encodes."""

    threads: list[threading.Thread] = field(default_factory=list)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.threads.append(threading.current_thread())
        return super().encode(text, add_special_tokens=add_special_tokens)


COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
BODIES = {
    "empty": (b"", "JSON"),
    "not json": (b"hello", "JSON"),
    "cut off": (b'{"prompt": "hel', "JSON"),
    "two values": (b"{}{}", "JSON"),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', "JSON"),
    "huge number": (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", "out of range"),
    "an array": (b"[]", "an array"),
    "a number": (b"5", "a number"),
    "null": (b"null", "null"),
    "latin-1": (b'{"prompt": "caf\xe9"}', "UTF-8"),
    "encoded surrogate": (b'{"prompt": "\xed\xa0\x80"}', "UTF-8"),
    "lone surrogate": (b'{"prompt": "\\ud800"}', "JSON"),
    "nested arrays": (b'{"prompt": ' + b"[" * 40_000 + b"]" * 40_000 + b"}", "nested"),
    "nested objects": (b'{"metadata": ' + b'{"a":' * 15_000 + b"1" + b"}" * 15_000 + b"}", "nested"),
}
# field -> (value, param that the error names)
COMPLETION_FIELDS: list[tuple[dict[str, Any], str | None]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": "", "add_special_tokens": False}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"prompt": ["a", [5]]}, "prompt"),
    ({"prompt": [5, "a"]}, "prompt"),
    ({"prompt": [5, True]}, "prompt[1]"),
    ({"prompt": [5.5]}, "prompt[0]"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [99999]}, "prompt"),
    ({"prompt": [1 << 70]}, "prompt"),
    ({"prompt": ["a"] * 600, "n": 2}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 1 << 40}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": []}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"n": "two"}, "n"),
    ({"seed": 1 << 64}, "seed"),
    ({"seed": "lucky"}, "seed"),
    ({"stop": 5}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 100}, "stop"),
    ({"stop": [5]}, "stop[0]"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [99999]}, None),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"-5": 1}}, "logit_bias"),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stream": "yes"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usages": True}}, "stream_options"),
    ({"stream": True, "echo": True, "logprobs": 1, "n": 2}, "stream"),
    ({"priority": 1 << 70}, "priority"),
    ({"model": 5}, "model"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 3}, "best_of"),
    ({"guided_regex": "a+"}, "guided_regex"),
]
CHAT_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{}]}, "messages.0.role"),
    ({"messages": [{"role": 5, "content": "hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages.0.content"),
    ({"messages": [*HI, {"role": "assistant", "tool_calls": [{}]}]}, "messages.1.tool_calls"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
    ({"logprobs": 5}, "logprobs"),
    ({"max_completion_tokens": 0}, "max_tokens"),
    ({"chat_template": "{{ evil }}"}, "chat_template"),
    ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
]


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_bodies_that_are_no_json_object(api: Api, path: str, name: str) -> None:
    body, words = BODIES[name]
    error = api.refused(path, body)
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert len(error["message"]) < 300


@pytest.mark.parametrize(("fields", "param"), COMPLETION_FIELDS, ids=lambda value: json.dumps(value)[:40])
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_values_of_completions(api: Api, fields: dict[str, Any], param: str | None, stream: bool) -> None:
    extra = {} if "stream_options" in fields else {"stream": stream}
    error = api.refused(COMPLETIONS, {"prompt": "a", **extra, **fields})
    assert param is None or error["param"] == param, error
    api.complete("next")


@pytest.mark.parametrize(("fields", "param"), CHAT_FIELDS, ids=lambda value: json.dumps(value)[:40])
def test_wrong_values_of_chats(api: Api, fields: dict[str, Any], param: str) -> None:
    error = api.refused(CHAT, {"messages": HI, **fields})
    assert error["param"] == param, error


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("max_token", "max_tokens"), ("temprature", "temperature"), ("streams", "stream"), ("MAX_TOKENS", None), ("zzz", None)],
)
def test_an_unknown_field_is_named_with_the_nearest_known_one(api: Api, name: str, nearest: str | None) -> None:
    error = api.refused(COMPLETIONS, {"prompt": "a", name: 1})
    assert (error["param"], error["code"]) == (name, "unknown_parameter")
    assert repr(name) in error["message"]
    assert nearest is None or f"did you mean '{nearest}'?" in error["message"]


def test_an_unknown_field_of_any_length_makes_a_short_error(api: Api) -> None:
    assert len(api.refused(COMPLETIONS, {"prompt": "a", "x" * 50_000: 1})["message"]) < 200


def test_a_prompt_past_the_context_says_both_lengths(api: Api) -> None:
    for prompt in ("a" * 127, "a" * 5000, [5] * 128):
        error = api.refused(COMPLETIONS, {"prompt": prompt})
        assert error["code"] == "context_length_exceeded"
        assert "128" in error["message"]
    assert api.refused(CHAT, {"messages": [{"role": "user", "content": "a" * 200}]})["code"] == "context_length_exceeded"


def test_text_that_cannot_fit_is_refused_without_encoding_it(make_api: Callable[..., Api]) -> None:
    """128 tokens of at most 5 characters (<bos>): encoding megabytes to say so would take the others' time."""
    front = ThreadFront()
    api = make_api(front=front)
    for path, body in (
        (COMPLETIONS, {"prompt": "a" * 640}),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 640}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a" * 320}] * 2}]}),
    ):
        error = api.refused(path, body)
        assert error["code"] == "context_length_exceeded"
        assert "640 characters" in error["message"]
    assert front.threads == []
    assert "640 tokens" in api.refused(COMPLETIONS, {"prompt": "a" * 639})["message"]
    assert len(front.threads) == 1
    assert api.post("/tokenize", {"prompt": "a" * 5000}).json()["count"] == 5001


def test_much_text_is_encoded_beside_the_event_loop(make_api: Callable[..., Api]) -> None:
    front = ThreadFront()
    api = make_api(front=front)
    api.complete(["a" * 100] * 3, max_tokens=1)
    assert set(front.threads) == {threading.main_thread()}
    front.threads.clear()
    api.complete(["a" * 100] * 50, max_tokens=1)
    assert len(front.threads) == 50
    assert threading.main_thread() not in front.threads


def test_an_unknown_model_is_a_404(api: Api) -> None:
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": HI}), ("/tokenize", {"prompt": "a"})):
        error = api.refused(path, {**body, "model": "gpt"}, 404)
        assert error["code"] == "model_not_found"
        assert "'letters'" in error["message"]


def test_a_body_too_large_is_a_413_with_and_without_its_length(api: Api) -> None:
    body = b'{"prompt": "' + b"a" * CONFIG.server.max_body_bytes + b'"}'
    for headers in ({}, {"transfer-encoding": "chunked"}, {"expect": "100-continue"}):
        assert api.refused(COMPLETIONS, body, 413, headers=headers)["code"] == "body_too_large"
    assert api.refused(COMPLETIONS, body * 10, 413)["code"] == "body_too_large"


def test_unknown_paths_and_methods(api: Api) -> None:
    for method, path, status in (
        ("GET", "/v1/completions", 405), ("DELETE", "/health", 405), ("GET", "/v2", 404), ("POST", "/v1/completions/", 404),
        ("GET", "/docs", 404), ("GET", "/openapi.json", 404), ("POST", "/v1/embeddings", 404),
    ):  # fmt: skip
        answer = api.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert path in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_step_that_fails_is_a_500_and_the_engine_goes_on(api: Api, stream: bool) -> None:
    error = api.refused(COMPLETIONS, {"prompt": "fatal!", "stream": stream}, 500)
    assert (error["type"], error["code"]) == ("server_error", "request_failed")
    api.complete("next")


def test_an_engine_that_dies_is_a_503_or_an_error_event(api: Api) -> None:
    api.engine.dies_after = 0
    assert api.refused(COMPLETIONS, {"prompt": "a"}, 503)["code"] == "engine_unavailable"
    api.engine.dies_after = 2
    first, second, last = api.stream(COMPLETIONS, prompt="a")
    assert first["choices"]
    assert second["choices"]
    assert last["error"]["code"] == "engine_unavailable"
    assert "died" in last["error"]["message"]


def test_a_dead_engine_is_a_503_that_says_when_to_come_back(api: Api) -> None:
    api.engine.is_healthy, api.engine.reason = False, "The engine is being restarted."
    for method, path in (("POST", COMPLETIONS), ("GET", "/health"), ("GET", "/memory")):
        answer = api.request(method, path, **({"json": {"prompt": "a"}} if method == "POST" else {}))
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == api.engine.reason
        assert answer.headers["retry-after"]


def test_a_bug_of_ours_is_a_500_without_its_insides(make_api: Callable[..., Api], monkeypatch: pytest.MonkeyPatch) -> None:
    api = make_api()

    def broken(*_: object, **__: object) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(api.engine, "generate", broken)
    error = api.refused(COMPLETIONS, {"prompt": "a"}, 500)
    assert "secret" not in error["message"]
