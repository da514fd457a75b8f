"""`LLM`: the engine in the caller's process. Owns the loop between callers and the engine core; a server is `brim.server`'s."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import msgspec

import brim.errors as errors
from brim.config.resolve import resolve
from brim.config.schema import BrimConfig
from brim.engine.completion import CompletionChunk, CompletionCollector, PositionScores, SequenceCompletion, Usage
from brim.engine.core import EngineCore
from brim.engine.messages import StartupProgress
from brim.engine.output_processor import OutputProcessor
from brim.engine.sampling_params import SamplingParams
from brim.engine.start_watch import StartWatch
from brim.errors import DeviceLost
from brim.front import open_front
from brim.runtime import build_engine_core

Prompt = str | Sequence[int]


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """A finished request: its prompt as token ids and its n completions in order."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[SequenceCompletion]
    usage: Usage
    prompt_logprobs: list[PositionScores | None] | None = None


class LLM:
    """A model, ready to generate, in this process.

        from brim import LLM, SamplingParams
        with LLM("demo") as llm:
            print(llm.generate("The capital of France is", SamplingParams(max_tokens=8))[0].outputs[0].text)

    Settings are named as in `config.schema` (max_model_len, max_num_seqs, memory="2GiB", dtype ...). Raises BrimError: unknown
    settings (ConfigError), models that cannot be used (ModelError), or what does not fit (MemoryBudgetError).
    """

    def __init__(self, model: str, *, on_progress: Callable[[StartupProgress], None] | None = None, **settings: Any) -> None:
        self.config: BrimConfig = resolve({"model": model, **settings})
        started = time.perf_counter()
        with ThreadPoolExecutor(1, "brim-front") as pool:
            front = pool.submit(open_front, self.config)
            self._core, self.info = _build(self.config, on_progress or _ignore, front.result)
            self._front = front.result()
        self.info["has_chat_template"] = self._front.chat_template is not None
        self.info["ready_s"] = round(time.perf_counter() - started, 3)
        self._processor = OutputProcessor(self._front.text_tools)
        self._collectors: dict[str, CompletionCollector] = {}
        self._numbers = itertools.count()

    # -- generating

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """All prompts at once; results in their order. A prompt is text or token ids; params one for all or one each.

        A single prompt that is refused raises its RequestError; in a list it ends with finish_reason "error" and others go on.
        """
        many = _as_list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(many)
        if len(each) != len(many):
            raise errors.InvalidParameter(f"{len(many)} prompts but {len(each)} params; give one or as many.", param="params")
        encoded = [self._encode(prompt) for prompt in many]
        ids = [self.add_request(prompt_ids, p) for prompt_ids, p in zip(encoded, each, strict=True)]
        results: dict[str, RequestOutput] = {}
        wanted = dict(zip(ids, zip(many, encoded, strict=True), strict=True))
        try:
            while len(results) < len(ids):
                for chunk in self.step():
                    result = self._collectors[chunk.request_id].add(chunk)
                    if result is not None:
                        prompt, prompt_ids = wanted[chunk.request_id]
                        results[chunk.request_id] = RequestOutput(
                            request_id=chunk.request_id,
                            prompt=prompt if isinstance(prompt, str) else None,
                            prompt_token_ids=prompt_ids,
                            outputs=result.sequences,
                            usage=result.usage,
                            prompt_logprobs=result.prompt_logprobs,
                        )
                if use_tqdm:
                    self._show_progress(len(results), len(ids))
        finally:
            for request_id in ids:
                self.abort_request(request_id)
        ordered = [results[request_id] for request_id in ids]
        if len(ordered) == 1:
            _raise_error(ordered[0].outputs[0].error, ordered[0].outputs[0].error_kind)
        return ordered

    def stream(self, prompt: Prompt | list[dict[str, Any]], params: SamplingParams | None = None) -> Iterator[CompletionChunk]:
        """Chunks of one request as they come (`chunk.text` is the new text); a list of messages is a conversation.

        Closing the iterator cancels the request. Raises RequestError where the request is refused or fails.
        """
        is_chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], Mapping)
        prompt_ids = self._encode_chat(prompt) if is_chat else self._encode(prompt)  # type: ignore[arg-type]
        request_id = self.add_request(prompt_ids, params or SamplingParams())
        try:
            while True:
                for chunk in self.step():
                    if chunk.request_id != request_id:
                        continue
                    _raise_error(chunk.error, chunk.error_kind)
                    yield chunk
                    if chunk.is_last:
                        return
        finally:
            self.abort_request(request_id)

    def chat(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None) -> RequestOutput:
        """One answer to a conversation ([{"role": "user", "content": ...}, ...]), by the model's chat template."""
        return self.generate([self._encode_chat(messages)], params)[0]

    # -- a step at a time, for callers with a loop of their own

    def add_request(self, prompt_ids: list[int], params: SamplingParams) -> str:
        """Start a request; the id that its chunks carry. Nothing is computed before `step`."""
        request_id = f"llm-{next(self._numbers)}"
        for message in self._processor.add(request_id, prompt_ids, params, arrival_s=time.time()):
            self._core.add(message)
        self._collectors[request_id] = CompletionCollector(request_id)
        return request_id

    def step(self) -> list[CompletionChunk]:
        """One step for all requests, and what is new of them. A request ends with the chunk that `is_last`."""
        processed = self._processor.process(self._core.step())
        for abort in processed.aborts:
            self._core.abort(abort.request_id)
        return processed.chunks

    def abort_request(self, request_id: str) -> None:
        """Forget a request, ended or not; unknown ids are ignored."""
        for abort in self._processor.abort(request_id):
            self._core.abort(abort.request_id)
        self._collectors.pop(request_id, None)

    # -- what it is

    def memory(self) -> dict[str, Any]:
        """cap_bytes, ledger, kv (blocks and tokens by state), phases: what `/memory` gives."""
        return self._core.memory()

    def stats(self) -> dict[str, Any]:
        """Counts since the start."""
        return self._core.stats()

    def startup_report(self) -> str:
        """Phases, ledger and KV size as plain text of 80 columns."""
        return str(self.info["startup_report"])

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; None where it has none."""
        return self._front.tokenizer

    def close(self) -> None:
        """Give the memory back. The object must not be used any more."""
        self._core.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # -- inside

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self._front.encode(prompt)
        if len(prompt) and type(prompt[0]) is int:  # the engine converts them all; those of an array become Python's here
            return list(prompt)
        return list(map(int, prompt))

    def _encode_chat(self, messages: Any) -> list[int]:
        return self._front.encode_chat(messages)

    def _show_progress(self, done: int, total: int) -> None:
        print(f"\r{done}/{total} requests", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _build(
    config: BrimConfig, on_progress: Callable[[StartupProgress], None], meanwhile: Callable[[], object]
) -> tuple[EngineCore, dict[str, Any]]:
    """Nobody can start this process again where its device is lost: the error names what to try."""
    watch = StartWatch()
    try:
        return build_engine_core(config, watch.noting(on_progress), meanwhile)
    except DeviceLost as error:
        raise DeviceLost(watch.hint(str(error))) from error


def _ignore(progress: StartupProgress) -> None:
    """For callers who do not want to know."""


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    listed: list[Any] = list(prompts)
    return [listed] if listed and isinstance(listed[0], int) else listed


def _raise_error(message: str | None, kind: str | None) -> None:
    """Raise the BrimError the engine named, if it named one."""
    if message is None:
        return
    found = getattr(errors, kind or "", errors.RequestFailed)
    raise (found if isinstance(found, type) and issubclass(found, errors.BrimError) else errors.RequestFailed)(message)
