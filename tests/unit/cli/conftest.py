"""A stand-in for the engine behind the verbs, and a way to call `brim` in this process."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

import brim.cli.engine
from brim.cli.main import main
from brim.engine.sampling_params import SamplingParams

MIB = 1 << 20
LEDGER = [
    {"category": "context", "owner": "process", "bytes": 100 * MIB, "known_by": "measured"},
    {"category": "weights", "owner": "model", "bytes": 512 * MIB, "known_by": "computed"},
    {"category": "kv_cache", "owner": "full", "bytes": 300 * MIB, "known_by": "computed"},
    {"category": "free", "owner": "device", "bytes": 999 * MIB, "known_by": "measured"},
]


@dataclass
class FakeLLM:
    """Says what it is told to say, a piece a token; records what it was asked. The clock of its work is `step_s`."""

    pieces: tuple[str, ...] = ("Hello", ", ", "wörld", "\n")
    has_chat_template: bool = False
    failure: BaseException | None = None
    asked: list[tuple[Any, SamplingParams]] = field(default_factory=list)
    opened_with: tuple[Any, dict[str, Any]] = (None, {})
    closed: bool = False

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    @property
    def info(self) -> dict[str, Any]:
        return {
            "device": {"platform": "fake", "device": "a fake", "torch": "2.13.0", "python": "3.11"},
            "dtype": "bfloat16",
            "weight_bytes": 512 * MIB,
            "kernels": "fake",
            "max_model_len": 4096,
            "vocab_size": 1000,
            "kv_tokens": 65536,
            "num_threads": 2,
            "ready_s": 1.25,
            "has_chat_template": self.has_chat_template,
        }

    def startup_report(self) -> str:
        return "the start-up report"

    def memory(self) -> dict[str, Any]:
        groups = [{"kind": "full", "window": 0, "block_bytes": 1600}, {"kind": "sliding", "window": 64, "block_bytes": 160}]
        kv = {"block_size": 16, "kv_tokens": 65536, "committed_bytes": 300 * MIB, "groups": groups}
        return {"cap_bytes": 1024 * MIB, "ledger": LEDGER, "kv": kv, "phases": [], "peak_bytes": 900 * MIB}

    def _output(self, prompt: Any, params: SamplingParams) -> SimpleNamespace:
        self.asked.append((prompt, params))
        if self.failure is not None:
            raise self.failure
        count = params.max_tokens if params.ignore_eos and params.max_tokens else len(self.pieces)
        completion = SimpleNamespace(text="".join(self.pieces), token_ids=list(range(count)), finish_reason="stop", logprobs=None)
        return SimpleNamespace(prompt_token_ids=[1, 2, 3], outputs=[completion])

    def generate(self, prompts: list[Any], params: Any, *, use_tqdm: bool = False) -> list[SimpleNamespace]:
        each = params if isinstance(params, list) else [params] * len(prompts)
        return [self._output(prompt, one) for prompt, one in zip(prompts, each, strict=True)]

    def chat(self, messages: list[dict[str, str]], params: SamplingParams) -> SimpleNamespace:
        return self._output(messages, params)

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[SimpleNamespace]:
        self.asked.append((prompt, params))
        for index, piece in enumerate(self.pieces):
            yield SimpleNamespace(text=piece, token_ids=[index], finish_reason=None)
        if self.failure is not None:
            raise self.failure


@dataclass
class Ended:
    """How a call of `brim` ended."""

    code: int
    out: str
    err: str


class Terminal(io.TextIOWrapper):
    """A text stream that says whether it is a terminal."""

    def __init__(self, data: bytes = b"", *, is_terminal: bool = False) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8", newline="", write_through=True)
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    @property
    def written(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()  # type: ignore[attr-defined]


Brim = Callable[..., Ended]


@pytest.fixture
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    """Every verb of this test gets this engine; the flags are resolved for real."""
    fake = FakeLLM()

    def open_llm(model: str | None, settings: dict[str, Any], *, quiet: bool = False, defaults: Any = None) -> FakeLLM:
        config = brim.cli.engine.build_config(model, settings)
        fake.opened_with = (config.model.model, brim.cli.engine.settings_of(config))
        return fake

    monkeypatch.setattr(brim.cli.engine, "open_llm", open_llm)
    return fake


@pytest.fixture
def brim_command(monkeypatch: pytest.MonkeyPatch) -> Brim:
    """Call `brim` with these arguments, this stdin (bytes; None is a terminal nobody types at)."""

    def call(
        *arguments: str, stdin: bytes | None = b"", stdout_is_terminal: bool = False, stderr_is_terminal: bool = False
    ) -> Ended:
        out, err = Terminal(is_terminal=stdout_is_terminal), Terminal(is_terminal=stderr_is_terminal)
        monkeypatch.setattr(sys, "stdin", Terminal(stdin or b"", is_terminal=stdin is None))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        monkeypatch.setattr(sys, "argv", ["brim", *arguments])
        for name in ("BRIM_CONFIG", "BRIM_PORT"):
            monkeypatch.delenv(name, raising=False)
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Ended(code, out.written, err.written)

    return call
