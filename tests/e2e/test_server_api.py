"""The API as the openai package sees it, over sockets and processes."""

from __future__ import annotations

import asyncio
import socket

import httpx
import openai
import pytest
from tests.e2e.conftest import TIMEOUT_S, Server, wait_until

GREEDY = {"model": "letters", "temperature": 0.0, "extra_body": {"ignore_eos": True}}
HI = [{"role": "user", "content": "hi"}]


def test_completions(server: Server) -> None:
    with server.client() as client:
        whole = client.completions.create(prompt="hello", max_tokens=6, **GREEDY)
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 6
        stream = client.completions.create(
            prompt="hello", max_tokens=6, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
        *chunks, last = list(stream)
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
        assert chunks[-1].choices[0].finish_reason == "length"
        assert last.usage is not None
        assert last.usage.total_tokens == whole.usage.total_tokens == 12


def test_chat_with_n_logprobs_stop_and_seed(server: Server) -> None:
    with server.client() as client:
        ask = client.chat.completions.create
        first = ask(messages=HI, n=2, seed=5, logprobs=True, top_logprobs=2, max_tokens=6, model="letters")
        again = ask(messages=HI, n=2, seed=5, max_tokens=6, model="letters")
        texts = [choice.message.content for choice in first.choices]
        assert texts == [choice.message.content for choice in again.choices]
        assert len(set(texts)) == 2
        assert first.choices[0].logprobs is not None
        assert first.choices[0].logprobs.content is not None
        assert len(first.choices[0].logprobs.content[0].top_logprobs) == 2
        text = ask(messages=HI, max_tokens=8, **GREEDY).choices[0].message.content or ""
        streamed = ""
        for chunk in ask(messages=HI, max_tokens=8, stop=[text[5:7]], stream=True, **GREEDY):
            streamed += chunk.choices[0].delta.content or ""
        assert streamed == text[: text.index(text[5:7])]
        assert [model.id for model in client.models.list()] == ["letters", "alias"]


def test_requests_run_beside_each_other(server: Server) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        done = await client.completions.create(prompt="a" * (number + 1), max_tokens=10, **GREEDY)
        return done.choices[0].text

    async def ask_all(numbers: range) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S) as client:
            return await asyncio.gather(*(ask(client, number) for number in numbers))

    together = asyncio.run(ask_all(range(20)))
    assert together[7:9] == asyncio.run(ask_all(range(7, 9)))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_work(server: Server, stream: bool) -> None:
    body = {"prompt": "hello", "max_tokens": 100, "ignore_eos": True, "stream": stream, "n": 3}
    with httpx.Client(base_url=server.url, timeout=TIMEOUT_S, trust_env=False) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as answer:
                frames = answer.iter_bytes()
                next(frames)
                assert server.metric("brim_requests_running") == 3
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=0.3)
    wait_until(lambda: server.metric("brim_requests_running") == 0, "the sequences were aborted", 1.0)


def test_errors_are_the_openai_packages_own(server: Server) -> None:
    with server.client() as client:
        ask = client.completions.create
        with pytest.raises(openai.BadRequestError, match="did you mean 'max_tokens'"):
            ask(model="letters", prompt="a", extra_body={"max_token": 3})
        with pytest.raises(openai.BadRequestError, match="context length of 128") as caught:
            ask(model="letters", prompt="a" * 500)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError, match="'gpt' does not exist"):
            ask(model="gpt", prompt="a")
        with pytest.raises(openai.BadRequestError, match="tools"):
            client.chat.completions.create(model="letters", messages=HI, tools=[{"type": "function", "function": {"name": "f"}}])
        with pytest.raises(openai.InternalServerError, match="a fatal letter"):
            ask(prompt="fatal!", **GREEDY)
        assert ask(prompt="a", **GREEDY).choices[0].text


def test_a_huge_body_is_refused_while_it_is_sent(server: Server) -> None:
    for num_bytes in (60_000, 3_000_000):
        answer = httpx.post(f"{server.url}/v1/completions", content=b'"' + b"a" * num_bytes, timeout=TIMEOUT_S, trust_env=False)
        assert answer.status_code == 413


@pytest.mark.parametrize(
    "raw",
    [
        b"GARBAGE\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 30\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n{}",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
    ],
)
def test_broken_http_does_not_hurt_the_others(server: Server, raw: bytes) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection:
        try:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
        except OSError as error:  # the server may have hung up already, at any point; it must not hang
            assert not isinstance(error, TimeoutError)
    assert server.get("/health").status_code == 200
