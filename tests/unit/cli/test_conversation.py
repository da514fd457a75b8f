"""The conversation held when there is no prompt."""

from __future__ import annotations

import builtins
from collections.abc import Iterable

import pytest
from tests.unit.cli.conftest import FakeLLM

from brim.cli.conversation import hold_conversation, read_entry
from brim.engine.sampling_params import SamplingParams
from brim.errors import PromptTooLong


def typed(monkeypatch: pytest.MonkeyPatch, lines: Iterable[str | type[BaseException]]) -> None:
    """A person types these lines, or keys that raise; then the input ends."""
    waiting = iter(lines)

    def read(prompt: str = "") -> str:
        line = next(waiting, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", read)


def held(monkeypatch: pytest.MonkeyPatch, llm: FakeLLM, lines: Iterable[str | type[BaseException]], **how: object) -> FakeLLM:
    typed(monkeypatch, lines)
    system = how.get("system")
    hold_conversation(llm, SamplingParams(), system=system, is_chat=bool(how.get("is_chat", True)))  # type: ignore[arg-type]
    return llm


def contents(llm: FakeLLM) -> list[list[str]]:
    return [[message["content"] for message in prompt] for prompt, _ in llm.asked]


def test_what_was_said_is_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    llm = held(monkeypatch, FakeLLM(pieces=("Hi", ".")), ["one", "two", "/bye", "never"], system="S")
    assert contents(llm) == [["S", "one"], ["S", "one", "Hi.", "two"]]
    assert capsys.readouterr().out == "Hi.Hi."


def test_clear_forgets_all_but_the_system_message(monkeypatch: pytest.MonkeyPatch) -> None:
    assert contents(held(monkeypatch, FakeLLM(pieces=("Hi",)), ["one", "/clear", "two"], system="S")) == [
        ["S", "one"],
        ["S", "two"],
    ]


def test_a_base_model_continues_each_entry_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = held(monkeypatch, FakeLLM(), ["Once upon", "/dev/null is", ""], is_chat=False)
    assert [prompt for prompt, _ in llm.asked] == ["Once upon", "/dev/null is"]


def test_an_unknown_command_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert not held(monkeypatch, FakeLLM(), ["/quit"]).asked
    assert "Unknown command /quit" in capsys.readouterr().err


def test_a_refused_entry_leaves_the_conversation_as_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = held(monkeypatch, FakeLLM(failure=PromptTooLong("Too long.")), ["one", "two"])
    assert contents(llm) == [["one"], ["two"]]
    assert "brim: Too long." in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = held(monkeypatch, FakeLLM(pieces=("Hi",), failure=KeyboardInterrupt()), ["one", "two"])
    assert contents(llm) == [["one"], ["one", "Hi", "two"]]


@pytest.mark.parametrize(
    ("lines", "entry"),
    [
        (["hello"], "hello"),
        (["```", "a", "", "b", "```"], "a\n\nb"),
        (["```a", "b```"], "a\nb"),
        (["```a```"], "a"),
        (["```", "/bye", "```"], "/bye"),
        (["/bye"], None),
        ([], None),
        (["```", "a"], "a"),
        ([KeyboardInterrupt, "again"], "again"),
        (["```", "a", KeyboardInterrupt, "again"], "again"),
    ],
)
def test_entries(monkeypatch: pytest.MonkeyPatch, lines: list[str], entry: str | None) -> None:
    typed(monkeypatch, lines)
    assert read_entry() == entry
