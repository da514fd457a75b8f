"""The small answers: health, models, memory, metrics, tokens; keys and the log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.unit.server.conftest import CONFIG, Api


def test_models_say_how_long_a_context_may_be(api: Api) -> None:
    cards = api.get("/v1/models").json()["data"]
    assert [(card["id"], card["max_model_len"], card["object"]) for card in cards] == [
        ("letters", 128, "model"),
        ("alias", 128, "model"),
    ]
    assert api.get("/v1/models/alias").json() == cards[1]
    assert api.get("/v1/models/other/name").status_code == 404


def test_health_and_version(api: Api) -> None:
    assert api.get("/health").json() == {"status": "ok"}
    assert set(api.get("/version").json()) == {"version"}


def test_memory_is_the_engines_account(api: Api) -> None:
    memory = api.get("/memory").json()
    assert {"cap_bytes", "ledger", "kv", "phases"} <= set(memory)
    assert set(memory["ledger"][0]) == {"category", "owner", "bytes", "known_by"}
    assert set(memory["kv"]["groups"][0]["num_blocks"]) >= {"free", "used", "cached"}
    assert set(memory["kv"]["groups"][0]["num_tokens"]) >= {"free", "used", "cached"}


def samples(api: Api) -> dict[tuple[str, str], float]:
    """(name, label values) -> value."""
    text = api.get("/metrics").text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name, ",".join(v for k, v in sorted(sample.labels.items()) if k != "le")] = sample.value
    return found


def test_metrics_count_what_was_served(api: Api) -> None:
    api.complete("hello hello", max_tokens=5)
    api.complete("hello hello", max_tokens=1, stream=False)
    api.engine.num_restarts = 3
    found = samples(api)
    assert found["brim_prompt_tokens_total", ""] == 24
    assert found["brim_generation_tokens_total", ""] == 6
    assert found["brim_request_seconds_count", ""] == 2
    assert found["brim_time_to_first_token_seconds_count", ""] == 2
    assert found["brim_time_per_output_token_seconds_count", ""] == 1
    assert found["brim_requests_running", ""] == 0
    assert found["brim_requests_waiting", ""] == 0
    assert found["brim_preemptions_total", ""] == 0
    assert found["brim_prefix_cache_hit_tokens_total", ""] == 8
    assert found["brim_engine_restarts_total", ""] == 3
    assert found["brim_memory_bytes", "kv_cache"] == 8192
    assert found["brim_memory_cap_bytes", ""] == 8192
    blocks = {state: found["brim_kv_blocks", f"full,{state}"] for state in ("free", "used", "cached")}
    assert sum(blocks.values()) == 199
    assert blocks["used"] == 0


def test_metrics_answer_while_the_engine_does_not(api: Api) -> None:
    api.engine.is_healthy = False
    found = samples(api)
    assert found["brim_engine_up", ""] == 0
    assert ("brim_requests_running", "") not in found


def test_two_servers_in_a_process_count_apart(make_api: Callable[..., Api]) -> None:
    one, other = make_api(), make_api()
    one.complete("hello")
    assert samples(other)["brim_prompt_tokens_total", ""] == 0


def test_a_text_too_long_to_tokenize_at_once_is_refused(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brim.server.prompts.MAX_TOKENIZE_CHARACTERS", 10)
    assert api.post("/tokenize", {"prompt": "a" * 10}).status_code == 200
    answer = api.post("/tokenize", {"prompt": "a" * 11})
    assert answer.status_code == 400
    assert "11 characters" in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "prompt"


def test_tokenize_and_back(api: Api) -> None:
    answer = api.post("/tokenize", {"prompt": "hey", "model": "letters", "return_token_strs": True}).json()
    assert answer == {"count": 4, "max_model_len": 128, "tokens": answer["tokens"], "token_strs": ["<bos>", "h", "e", "y"]}
    bare = api.post("/tokenize", {"prompt": "hey", "add_special_tokens": False}).json()
    assert bare["tokens"] == answer["tokens"][1:]
    assert bare["token_strs"] is None
    assert api.post("/detokenize", {"tokens": bare["tokens"]}).json() == {"prompt": "hey"}
    chat = api.post("/tokenize", {"messages": [{"role": "user", "content": "hey"}]}).json()
    assert api.post("/detokenize", {"tokens": chat["tokens"]}).json()["prompt"] == "<bos>user hey.assistant "


def test_tokenize_wants_one_of_its_two(api: Api) -> None:
    api.refused("/tokenize", {})
    api.refused("/tokenize", {"prompt": "a", "messages": []})
    assert api.refused("/tokenize", {"prompts": "a"})["message"].endswith("did you mean 'prompt'?")
    for wrong in ([-1], [99999], [1 << 80], ["a"], "a"):
        api.refused("/detokenize", {"tokens": wrong})


def test_keys_are_asked_for_everywhere_but_at_health(make_api: Callable[..., Api]) -> None:
    api = make_api(replace(CONFIG, server=replace(CONFIG.server, api_keys=("one", "twö"))))
    assert api.get("/health").status_code == 200
    for path in ("/v1/models", "/metrics", "/memory", "/nowhere"):
        for headers in ({}, {"authorization": "Bearer two"}, {"authorization": "one"}, {"authorization": "Basic one"}):
            answer = api.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    for key in ("one", "twö", "own"):
        assert api.get("/v1/models", headers={"authorization": f"Bearer {key}".encode()}).status_code == 200


def test_requests_are_logged_where_asked_without_what_was_said(
    make_api: Callable[..., Api], capsys: pytest.CaptureFixture[str]
) -> None:
    api = make_api(replace(CONFIG, server=replace(CONFIG.server, log_requests=True)))
    api.complete("hello")
    api.get("/nowhere%0A")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("brim: POST '/v1/completions' 200 ")
    assert "404" in second
