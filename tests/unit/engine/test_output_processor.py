from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from brim.engine.completion import CompletionCollector, CompletionResult
from brim.engine.messages import PositionLogprobs, SequenceOutput
from brim.engine.output_processor import OutputProcessor
from brim.engine.sampling_params import SamplingParams
from brim.errors import InvalidParameter

TEXTS = {1: "Hello", 2: " wor", 3: "ld", 4: "!", 5: " EN", 6: "D more", 9: ""}


class FakeDetokenizer:
    """Holds the last piece back until the next one or the end, as a real one does with half a character."""

    def __init__(self) -> None:
        self.held = ""

    def feed(self, ids: Sequence[int]) -> str:
        text = self.held + "".join(TEXTS[i] for i in ids[:-1])
        self.held = TEXTS[ids[-1]]
        return text

    def finish(self) -> str:
        held, self.held = self.held, ""
        return held


class FakeStops:
    def __init__(self, params: SamplingParams) -> None:
        self.params, self.text, self.shown = params, "", 0

    def feed(self, text: str) -> tuple[str, str | None]:
        self.text += text
        for stop in self.params.stop:
            at = self.text.find(stop)
            if at >= 0:
                end = at + len(stop) if self.params.include_stop_str_in_output else at
                return self.text[self.shown : end], stop
        safe = len(self.text) - max(len(stop) for stop in self.params.stop) + 1
        shown = self.text[self.shown : max(safe, self.shown)]
        self.shown += len(shown)
        return shown, None

    def finish(self) -> str:
        return self.text[self.shown :]


class FakeText:
    def new_detokenizer(self, params: SamplingParams) -> FakeDetokenizer:
        return FakeDetokenizer()

    def new_stop_scanner(self, params: SamplingParams) -> FakeStops:
        return FakeStops(params)

    def token_text(self, token_id: int) -> str:
        return TEXTS[token_id]


@pytest.fixture
def processor() -> OutputProcessor:
    return OutputProcessor(FakeText())


def start(processor: OutputProcessor, **params: Any) -> list[str]:
    added = processor.add("req", [7, 8, 9], SamplingParams(**params), arrival_s=1.0)
    return [message.request_id for message in added]


def collect(processor: OutputProcessor, *outputs: SequenceOutput) -> tuple[CompletionResult | None, list[str]]:
    collector, result, aborts = CompletionCollector("req"), None, []
    for output in outputs:
        processed = processor.process([output])
        aborts += [abort.request_id for abort in processed.aborts]
        for chunk in processed.chunks:
            assert result is None
            result = collector.add(chunk)
    return result, aborts


def test_text_comes_in_pieces_and_adds_up(processor: OutputProcessor) -> None:
    start(processor)
    outputs = [SequenceOutput("req", [1]), SequenceOutput("req", [2]), SequenceOutput("req", [3], "length", num_cached_tokens=2)]
    result, aborts = collect(processor, *outputs)
    assert result is not None and not aborts
    assert result.text == "Hello world" and result.sequences[0].token_ids == [1, 2, 3]
    assert result.sequences[0].finish_reason == "length"
    assert (result.usage.prompt_tokens, result.usage.completion_tokens, result.usage.cached_tokens) == (3, 3, 2)
    assert result.usage.total_tokens == 6 and processor.num_requests == 0


def test_the_token_that_ended_it_is_no_text(processor: OutputProcessor) -> None:
    start(processor)
    result, _ = collect(processor, SequenceOutput("req", [1]), SequenceOutput("req", [4], "stop"))
    assert result is not None and result.text == "Hello" and result.sequences[0].token_ids == [1, 4]
    assert result.sequences[0].stop_reason is None and result.usage.completion_tokens == 2


@pytest.mark.parametrize(("include", "text"), [(False, "Hello"), (True, "Hello!")])
def test_stop_token_is_text_only_where_asked_for(processor: OutputProcessor, include: bool, text: str) -> None:
    start(processor, stop_token_ids=(4,), include_stop_str_in_output=include)
    result, _ = collect(processor, SequenceOutput("req", [1]), SequenceOutput("req", [4], "stop", 4))
    assert result is not None and result.text == text and result.sequences[0].stop_reason == 4


def test_stop_string_over_two_tokens_ends_it_and_stops_the_engine(processor: OutputProcessor) -> None:
    start(processor, stop=("END",))
    result, aborts = collect(processor, *(SequenceOutput("req", [i]) for i in (1, 5, 6, 4)))
    assert result is not None and aborts == ["req"]
    assert result.text == "Hello " and result.sequences[0].finish_reason == "stop" and result.sequences[0].stop_reason == "END"
    assert processor.process([SequenceOutput("req", [4]), SequenceOutput("req", [], "abort")]).chunks == []


def test_stop_string_found_in_the_last_piece_needs_no_abort(processor: OutputProcessor) -> None:
    start(processor, stop=("D m",))
    result, aborts = collect(processor, SequenceOutput("req", [5]), SequenceOutput("req", [6], "length"))
    assert result is not None and not aborts
    assert result.text == " EN" and result.sequences[0].finish_reason == "stop"


def test_held_back_text_is_shown_at_the_end(processor: OutputProcessor) -> None:
    start(processor, stop=("ENDLESS",))
    result, _ = collect(processor, SequenceOutput("req", [1]), SequenceOutput("req", [5], "length"))
    assert result is not None and result.text == "Hello EN" and result.sequences[0].stop_reason is None


def test_n_sequences_have_own_seeds_and_one_prompt(processor: OutputProcessor) -> None:
    added = processor.add("req", [7], SamplingParams(n=3, seed=(1 << 63) - 2, prompt_logprobs=1), arrival_s=0.0)
    assert [m.request_id for m in added] == ["req#0", "req#1", "req#2"]
    assert [m.params.seed for m in added] == [(1 << 63) - 2, (1 << 63) - 1, -(1 << 63)]
    assert [m.params.prompt_logprobs for m in added] == [1, None, None] and all(m.params.n == 1 for m in added)
    result, _ = collect(
        processor,
        SequenceOutput("req#1", [1], "length"),
        SequenceOutput("req#0", [2], "length", num_cached_tokens=0),
        SequenceOutput("req#2", [3, 4], "length", num_cached_tokens=1),
    )
    assert result is not None
    assert [s.text for s in result.sequences] == [" wor", "Hello", "ld!"]
    assert (result.usage.prompt_tokens, result.usage.completion_tokens, result.usage.cached_tokens) == (1, 4, 0)


def test_without_a_seed_the_engine_draws_each(processor: OutputProcessor) -> None:
    added = processor.add("req", [7], SamplingParams(n=2), arrival_s=0.0)
    assert [m.params.seed for m in added] == [None, None]


def test_abort_names_what_still_runs(processor: OutputProcessor) -> None:
    start(processor, n=3)
    processor.process([SequenceOutput("req#1", [1], "length")])
    assert [abort.request_id for abort in processor.abort("req")] == ["req#0", "req#2"]
    assert processor.abort("req") == [] and processor.num_requests == 0
    assert processor.process([SequenceOutput("req#0", [1])]).chunks == []


def test_logprobs_come_with_text(processor: OutputProcessor) -> None:
    start(processor, logprobs=2, prompt_logprobs=0)
    scored = PositionLogprobs(1, -0.5, 2, [4, 1], [-0.25, -0.5])
    output = SequenceOutput("req", [1], "length", None, [scored], [None, PositionLogprobs(2, -1.0, 3, [], [])])
    result, _ = collect(processor, output)
    assert result is not None and result.prompt_logprobs is not None and result.sequences[0].logprobs is not None
    position = result.sequences[0].logprobs[0]
    assert (position.chosen.text, position.chosen.logprob, position.chosen.rank) == ("Hello", -0.5, 2)
    assert [(s.text, s.rank) for s in position.top] == [("!", 1), ("Hello", 2)]
    first, second = result.prompt_logprobs
    assert first is None and second is not None and second.chosen.text == " wor"


def test_errors_reach_the_caller_and_a_dead_engine_fails_all(processor: OutputProcessor) -> None:
    start(processor)
    result, _ = collect(processor, SequenceOutput("req", [], "error", error="too long", error_kind="PromptTooLong"))
    assert result is not None and result.sequences[0].error_kind == "PromptTooLong"
    start(processor, n=2)
    chunks = processor.fail_all("the engine died", "EngineDead")
    assert [(c.index, c.error, c.is_last) for c in chunks] == [(0, "the engine died", False), (1, "the engine died", True)]
    assert processor.num_requests == 0


def test_request_id_in_use(processor: OutputProcessor) -> None:
    start(processor)
    with pytest.raises(InvalidParameter, match="in use"):
        start(processor)
