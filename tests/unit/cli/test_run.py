"""`brim run`: what reaches stdout, what reaches the engine."""

from __future__ import annotations

import json

import pytest
from tests.unit.cli.conftest import Brim, FakeLLM

from brim.config.schema import MemoryRequest
from brim.errors import PromptTooLong


@pytest.mark.parametrize("how", [(), ("--no-stream",)])
def test_stdout_is_the_completion_alone_byte_for_byte(brim_command: Brim, fake_llm: FakeLLM, how: tuple[str, ...]) -> None:
    ended = brim_command("run", "demo", "hi", *how)
    assert (ended.code, ended.out) == (0, "Hello, wörld\n")
    assert fake_llm.closed


def test_a_terminal_gets_a_newline_at_the_end(brim_command: Brim, fake_llm: FakeLLM) -> None:
    fake_llm.pieces = ("one",)
    assert brim_command("run", "demo", "hi", stdout_is_terminal=True).out == "one\n"
    assert brim_command("run", "demo", "hi").out == "one"


def test_sampling_flags_reach_the_engine(brim_command: Brim, fake_llm: FakeLLM) -> None:
    flags = (
        "--temperature 0 --max-tokens 8 --top-p 0.5 --top-k 3 --min-p 0.1 --seed 7 --stop END --stop ! --repetition-penalty 1.1"
    )
    assert brim_command("run", "demo", "hi", *flags.split()).code == 0
    prompt, params = fake_llm.asked[0]
    assert prompt == "hi"
    assert (params.temperature, params.max_tokens, params.top_p, params.top_k, params.min_p) == (0.0, 8, 0.5, 3, 0.1)
    assert (params.seed, params.stop, params.repetition_penalty) == (7, ("END", "!"), 1.1)


def test_engine_flags_reach_the_engine_as_values(brim_command: Brim, fake_llm: FakeLLM) -> None:
    flags = "--memory 2GiB --max-model-len auto --no-enable-prefix-caching --dtype float32 --enforce-eager --seed 3"
    brim_command("run", "demo", "hi", *flags.split())
    assert fake_llm.opened_with == (
        "demo",
        {
            "memory": MemoryRequest("bytes", num_bytes=2 << 30),
            "max_model_len": "auto",
            "enable_prefix_caching": False,
            "dtype": "float32",
            "enforce_eager": True,
            "seed": 3,
        },
    )


@pytest.mark.parametrize("arguments", [("-",), ()])
def test_the_prompt_may_come_on_stdin(brim_command: Brim, fake_llm: FakeLLM, arguments: tuple[str, ...]) -> None:
    assert brim_command("run", "demo", *arguments, stdin=" two\nlines ü\n".encode()).code == 0
    assert fake_llm.asked[0][0] == " two\nlines ü"


def test_a_given_prompt_leaves_stdin_alone(brim_command: Brim, fake_llm: FakeLLM) -> None:
    brim_command("run", "demo", "hi", stdin=b"not this")
    assert fake_llm.asked[0][0] == "hi"


def test_invalid_utf8_is_refused(brim_command: Brim, fake_llm: FakeLLM) -> None:
    ended = brim_command("run", "demo", "-", stdin=b"ab\xff")
    assert (ended.code, ended.err) == (1, "brim: The prompt on stdin is not valid UTF-8 (byte 2).\n")
    assert brim_command("run", "demo", "a\udcff").err == "brim: The prompt is not valid UTF-8.\n"


def test_json_is_one_object(brim_command: Brim, fake_llm: FakeLLM) -> None:
    found = json.loads(brim_command("run", "demo", "hi", "--json").out)
    assert found["text"] == "Hello, wörld\n"
    assert (found["finish_reason"], found["prompt_tokens"], found["completion_tokens"]) == ("stop", 3, 4)


def test_reports_go_to_stderr(brim_command: Brim, fake_llm: FakeLLM) -> None:
    ended = brim_command("run", "demo", "hi", "--verbose", "--memory-report")
    assert ended.out == "Hello, wörld\n"
    assert "the start-up report" in ended.err
    assert "4 tokens in" in ended.err
    assert "912.00 MiB" in ended.err
    assert "KV cache: 65,536 tokens\n" in ended.err
    assert "Peak of this process: 900.00 MiB" in ended.err


def test_a_person_sees_what_the_start_came_to(brim_command: Brim, fake_llm: FakeLLM) -> None:
    said = brim_command("run", "demo", "hi", stderr_is_terminal=True).err.splitlines()
    assert said[0] == "Ready in 1.2 s. 912.00 MiB of a cap of 1.00 GiB held; KV cache: 65,536 tokens"
    assert [line.split()[:4] for line in said[1:4]] == [
        ["context", "100.00", "MiB", "11%"],
        ["weights", "512.00", "MiB", "56%"],
        ["kv_cache", "300.00", "MiB", "33%"],
    ]
    assert said[2].endswith(" " + "#" * 40)
    assert "4 tokens in" in said[4]
    assert max(map(len, said)) <= 80
    for quiet in (("--json",), ()):
        assert "Ready" not in brim_command("run", "demo", "hi", *quiet, stderr_is_terminal=bool(quiet)).err
    assert "the start-up report" in brim_command("run", "demo", "hi", "--verbose", stderr_is_terminal=True).err


def test_a_model_with_a_template_is_asked_as_a_chat(brim_command: Brim, fake_llm: FakeLLM) -> None:
    fake_llm.has_chat_template = True
    brim_command("run", "demo", "hi", "--system", "Be brief.")
    brim_command("run", "demo", "hi", "--json")
    brim_command("run", "demo", "hi", "--raw")
    user = {"role": "user", "content": "hi"}
    assert [prompt for prompt, _ in fake_llm.asked] == [[{"role": "system", "content": "Be brief."}, user], [user], "hi"]


def test_a_system_message_needs_a_template(brim_command: Brim, fake_llm: FakeLLM) -> None:
    ended = brim_command("run", "demo", "hi", "--system", "Be brief.")
    assert ended.code == 1
    assert "--chat-template" in ended.err


def test_json_needs_a_prompt(brim_command: Brim, fake_llm: FakeLLM) -> None:
    assert "--json needs a PROMPT" in brim_command("run", "demo", "--json", stdin=None).err


def test_a_refused_request_is_a_sentence(brim_command: Brim, fake_llm: FakeLLM) -> None:
    fake_llm.failure = PromptTooLong("The prompt has 9000 tokens; the context holds 4096.")
    ended = brim_command("run", "demo", "hi")
    assert (ended.code, ended.err) == (1, "brim: The prompt has 9000 tokens; the context holds 4096.\n")
