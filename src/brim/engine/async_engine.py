"""The engine as an event loop sees it: requests in, chunks of text out, whatever happens to the engine process.

Owns requests in flight and calls to the engine; the process is `supervisor`'s, the text `output_processor`'s.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from brim.engine.completion import CompletionChunk, Usage
from brim.engine.messages import AbortRequest, ControlCall, ControlReply, FromEngine, StepOutputs
from brim.engine.output_processor import OutputProcessor
from brim.engine.sampling_params import SamplingParams
from brim.engine.start_watch import PhaseSoFar
from brim.engine.supervisor import Supervisor
from brim.engine.text_seam import TextTools
from brim.errors import EngineDead, EngineError

_CALL_TIMEOUT_S = 10.0


class AsyncEngine:
    """For one event loop. Every request gets its end: a last chunk, or EngineDead raised before the first."""

    def __init__(self, supervisor: Supervisor, text_tools: TextTools) -> None:
        self._supervisor = supervisor
        self._processor = OutputProcessor(text_tools)
        self._boxes: dict[str, _Mailbox] = {}
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count(1)
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        supervisor.on_message = self._on_message
        supervisor.on_down = self._on_down

    # -- how it is

    @property
    def is_healthy(self) -> bool:
        """True where a request sent now would be served."""
        return self._supervisor.state == "ready" and not self._draining

    @property
    def reason(self) -> str:
        """Why it is not healthy: a sentence; empty where it is."""
        if self._draining:
            return "The server is shutting down and takes no new requests."
        return self._supervisor.reason

    @property
    def info(self) -> dict[str, Any]:
        """What the engine said of itself when it was ready: max_model_len, vocab_size, kv_tokens ..."""
        return self._supervisor.info

    @property
    def num_restarts(self) -> int:
        """How often the engine process was started again."""
        return self._supervisor.num_restarts

    @property
    def start_phases(self) -> Sequence[PhaseSoFar]:
        """What the engine's last start went through, so far."""
        return self._supervisor.start_phases

    @property
    def num_requests(self) -> int:
        """Requests in flight."""
        return len(self._boxes)

    # -- requests

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, *, priority: int = 0
    ) -> AsyncGenerator[list[CompletionChunk]]:
        """Chunks of one request as they come, those that came since in one list, the last of all with is_last. Closing the
        iterator aborts the request.

        Raises EngineDead while the engine does not serve. A failure in flight is a chunk with `error` and `error_kind`.
        """
        if not self.is_healthy:
            raise EngineDead(self.reason)
        messages = self._processor.add(request_id, prompt_ids, params, arrival_s=time.time(), priority=priority)
        box = self._boxes[request_id] = _Mailbox()
        self._idle.clear()
        try:
            for message in messages:
                self._supervisor.send(message)
            while True:
                chunks = await box.take()
                yield chunks
                if chunks[-1].is_last:
                    return
        finally:
            self._forget(request_id)

    def abort(self, request_id: str) -> None:
        """End a request: its iterator gives a last chunk with finish_reason "abort". Unknown ids are ignored."""
        box = self._boxes.get(request_id)
        if box is None:
            return
        self._send_aborts(self._processor.abort(request_id))
        box.put(CompletionChunk(request_id=request_id, finish_reason="abort", usage=Usage(0, 0), is_last=True))

    def _forget(self, request_id: str) -> None:
        self._send_aborts(self._processor.abort(request_id))
        self._boxes.pop(request_id, None)
        if not self._boxes:
            self._idle.set()

    def _send_aborts(self, aborts: Sequence[AbortRequest]) -> None:
        if self._supervisor.state == "ready":
            for message in aborts:
                self._supervisor.send(message)

    # -- calls

    async def stats(self) -> dict[str, Any]:
        """Counts of the engine core, with "kv": the cache by state. Raises EngineError where it does not answer."""
        return await self._call("stats")

    async def memory(self) -> dict[str, Any]:
        """cap_bytes, ledger, kv, phases. Raises EngineError where it does not answer."""
        return await self._call("memory")

    async def _call(self, name: str) -> dict[str, Any]:
        call_id = next(self._numbers)
        answer = self._calls[call_id] = asyncio.get_running_loop().create_future()
        try:
            self._supervisor.send(ControlCall(call_id, name))
            return await asyncio.wait_for(answer, _CALL_TIMEOUT_S)
        except TimeoutError:
            raise EngineError(f"The engine did not answer a '{name}' call within {_CALL_TIMEOUT_S:g} s.") from None
        finally:
            del self._calls[call_id]

    # -- the end

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and let those in flight end. False where some did not within `timeout_s`; these are failed."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            late = f"; this request did not end within {timeout_s:g} s" if timeout_s else ""
            self._fail_all(f"The server is shutting down{late}.")
            return False
        return True

    async def close(self) -> None:
        """Stop the engine process; what is in flight fails."""
        self._draining = True
        self._fail_all("The server is shutting down.")
        await self._supervisor.close()

    # -- what the engine says

    def _on_message(self, message: FromEngine) -> None:
        if isinstance(message, StepOutputs):
            processed = self._processor.process(message.outputs)
            self._send_aborts(processed.aborts)
            self._deliver(processed.chunks)
        elif isinstance(message, ControlReply):
            answer = self._calls.get(message.call_id)
            if answer is None or answer.done():
                return
            if message.error is not None:
                answer.set_exception(EngineError(message.error))
            else:
                answer.set_result(message.result)

    def _on_down(self, error: EngineDead) -> None:
        self._fail_all(str(error))
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(EngineDead(str(error)))

    def _fail_all(self, why: str) -> None:
        self._deliver(self._processor.fail_all(why, "EngineDead"))

    def _deliver(self, chunks: Sequence[CompletionChunk]) -> None:
        for chunk in chunks:
            box = self._boxes.get(chunk.request_id)
            if box is not None:
                box.put(chunk)


class _Mailbox:
    """Chunks for one waiting task, which takes all there are: one that is behind catches up in fewer turns."""

    __slots__ = ("_chunks", "_waiter")

    def __init__(self) -> None:
        self._chunks: list[CompletionChunk] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, chunk: CompletionChunk) -> None:
        self._chunks.append(chunk)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[CompletionChunk]:
        """At least one."""
        while not self._chunks:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            self._waiter = None
        taken, self._chunks = self._chunks, []
        return taken
