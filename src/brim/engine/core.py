"""The engine core: requests in, outputs out, one step at a time. Owns the loop around scheduler and executor and what happens
when a step fails; not the processes, the sockets or the text.

    a wrong request             an output with finish_reason "error" for it alone
    OutOfDeviceMemory           the step is cancelled, the KV cache gives blocks back, the step is planned again
    another error in a step     the sequences of that step fail; the next step goes on; `max_failed_steps` in a row: EngineError
    DeviceLost                  propagates: only a new process helps
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from brim.engine.kv_guard import KVGuard
from brim.engine.messages import AddRequest, SequenceOutput
from brim.engine.request_check import checked_prompt, most_tokens
from brim.engine.scheduler import Scheduler
from brim.engine.sequence import Sequence
from brim.engine.step import Executor, StepPlan, StepResult
from brim.errors import DeviceLost, EngineError, OutOfDeviceMemory, RequestError

_MASK = (1 << 64) - 1
_PLAIN_RETRIES = 2  # of a step that is out of memory when the KV cache can give nothing more


def draw_seed(engine_seed: int, counter: int) -> int:
    """The seed of request number `counter` without one of its own: splitmix64, as a signed 64-bit number."""
    z = (engine_seed * 0xD1342543DE82EF95 + (counter + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z


class EngineCore:
    """Single-threaded: add, abort and step are called from one thread, in any order."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        vocab_size: int,
        eos_token_ids: SequenceABC[int] = (),
        seed: int = 0,
        guard: KVGuard | None = None,
        max_failed_steps: int = 5,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.guard = guard or KVGuard(scheduler, executor)
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._seed = seed
        self._max_failed_steps = max_failed_steps
        self._num_requests = 0
        self._num_refused = 0
        self._num_failed_steps = 0
        self._failed_in_a_row = 0
        self._num_out_of_memory = 0
        self._draining = False
        self._replies: list[SequenceOutput] = []
        self._in_flight: deque[tuple[StepPlan, Callable[[], StepResult]]] = deque()

    # -- requests

    def add(self, request: AddRequest) -> None:
        """Queue a request; a wrong one is answered by the next `step`, never raised."""
        try:
            self._add(request)
        except RequestError as error:
            self._num_refused += 1
            self._replies.append(
                SequenceOutput(request.request_id, [], "error", error=str(error), error_kind=type(error).__name__)
            )

    def _add(self, request: AddRequest) -> None:
        if self._draining:
            raise RequestError("The engine is shutting down and takes no new requests.")
        if self.scheduler.has_request(request.request_id):
            raise RequestError(f"Request id '{request.request_id}' is in use.", param="request_id")
        params, scheduler = request.params, self.scheduler
        prompt = checked_prompt(request.prompt_ids, self._vocab_size)
        max_total_tokens = most_tokens(len(prompt), params, scheduler.limits, scheduler.blocks, self._vocab_size)
        number = self._num_requests
        self._num_requests += 1
        sequence = Sequence(
            request.request_id,
            prompt,
            params,
            max_total_tokens=max_total_tokens,
            seed=draw_seed(self._seed, number) if params.seed is None else params.seed,
            eos_token_ids=self._eos_token_ids,
            num_groups=len(self.scheduler.blocks.pools),
            order=(request.priority, number),
            arrival_s=request.arrival_s,
        )
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """End a sequence; the next `step` answers with finish_reason "abort". Unknown ids are ignored."""
        output = self.scheduler.abort(request_id)
        if output is not None:
            self._replies.append(output)

    def drain(self) -> None:
        """Refuse new requests from now on; the caller keeps stepping until `has_work` is False."""
        self._draining = True

    @property
    def has_work(self) -> bool:
        """True where `step` has something to do."""
        return bool(self._replies) or self.scheduler.has_unfinished

    # -- steps

    def step(self) -> list[SequenceOutput]:
        """Advance by one step: keep the pipeline full, settle its oldest step, return what the sequences got."""
        outputs, self._replies = self._replies, []
        retries = 0
        while True:
            failing: list[StepPlan] = []
            try:
                settled = self._advance(failing, alone=retries > 0)
            except OutOfDeviceMemory as error:
                self._num_out_of_memory += 1
                retries += 1
                self._cancel_all()
                if self.guard.relieve() or retries <= _PLAIN_RETRIES:
                    continue
                outputs += self._fail_step(failing, error)
                return outputs
            except DeviceLost:
                raise
            except Exception as error:
                self._cancel_all()
                outputs += self._fail_step(failing, error)
                return outputs
            if settled is not None:
                outputs += self.scheduler.update(*settled)
                self.guard.note_step()
                self._failed_in_a_row = 0
                return outputs
            if not self.scheduler.has_unfinished:
                return outputs
            if not self.guard.grow_now():
                return outputs + self._fail_stuck()

    def tend(self) -> None:
        """Between requests: give memory back that neighbours on the device need, or take back what they left."""
        if not self.has_work:
            with suppress(OutOfDeviceMemory):  # what cannot be moved now is tried again
                self.guard.adjust()

    def _advance(self, failing: list[StepPlan], *, alone: bool) -> tuple[StepPlan, StepResult] | None:
        """Plan and submit while the pipeline has room, then wait for the oldest step. `failing` gets the plan being worked on.

        alone: one step only, so that what failed ahead of a good step does not cancel that one again and again."""
        if self.guard.is_due:
            self.guard.adjust(in_flight=bool(self._in_flight))
        while not self.guard.is_due and (plan := self.scheduler.schedule()) is not None:
            failing[:] = [plan]
            self._in_flight.append((plan, self.executor.submit(plan)))
            if alone:
                break
        if not self._in_flight:
            return None
        plan, wait = self._in_flight[0]
        failing[:] = [plan]
        result = wait()
        self._in_flight.popleft()
        return plan, result

    def _cancel_all(self) -> None:
        """A step failed: let the others in flight end, and forget them all; their tokens will come out the same again."""
        for _, wait in self._in_flight:
            try:
                wait()
            except DeviceLost:
                raise
            except Exception:
                pass
        self._in_flight.clear()
        self.scheduler.cancel_all()

    def _fail_step(self, failing: list[StepPlan], error: Exception) -> list[SequenceOutput]:
        """Fail the sequences of one step; raise EngineError when steps keep failing."""
        self._num_failed_steps += 1
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self._max_failed_steps or not failing:
            raise EngineError(f"{self._failed_in_a_row} steps failed in a row, the last with: {error}") from error
        reason = f"The step that served this request failed: {error}"
        finish = self.scheduler.finish
        failed = [finish(seq.request_id, "error", reason, "RequestFailed") for seq in failing[0].sequences]
        return [output for output in failed if output is not None]

    def _fail_stuck(self) -> list[SequenceOutput]:
        """The cache was shrunk below what the next sequence needs and cannot grow: it alone is failed, so others can go on."""
        sequence = self.scheduler.next_in_line()
        assert sequence is not None, "nothing can be scheduled and nothing waits"
        usable = ", ".join(str(count - 1) for count in self.scheduler.blocks.num_blocks)
        reason = (
            f"Memory pressure shrank the KV cache to {usable} blocks of {self.scheduler.blocks.block_size} tokens, too few for "
            f"the {sequence.num_tokens} tokens of this request so far."
        )
        output = self.scheduler.finish(sequence.request_id, "error", reason, "OutOfDeviceMemory")
        return [output] if output is not None else []

    def close(self) -> None:
        """Give the device back. Unfinished sequences are not answered: drain or abort them first."""
        self.executor.close()

    # -- what is going on

    def stats(self) -> dict[str, Any]:
        """Flat counts for /metrics: queue lengths now, totals since the start."""
        return {
            "running": self.scheduler.num_running,
            "waiting": self.scheduler.num_waiting,
            "in_flight_steps": self.scheduler.num_in_flight,
            **asdict(self.scheduler.counters),
            "num_requests": self._num_requests,
            "num_refused": self._num_refused,
            "num_failed_steps": self._num_failed_steps,
            "num_out_of_memory": self._num_out_of_memory,
            "num_kv_shrinks": self.guard.num_shrinks,
            "num_kv_grows": self.guard.num_grows,
            "draining": self._draining,
        }

    def memory(self) -> dict[str, Any]:
        """What `/memory` and `LLM.memory()` give: the executor's account with the KV cache as it is now."""
        report = self.executor.memory_report()
        return {**report, "kv": {**report.get("kv", {}), **self.memory_stats()}}

    def memory_stats(self) -> dict[str, Any]:
        """The KV cache by state, a group a row, in blocks, tokens and bytes; block 0 of each group is in committed_bytes only."""
        blocks = self.scheduler.blocks
        groups = []
        for group, pool in zip(blocks.layout.groups, blocks.pools, strict=True):
            counts = pool.counts
            groups.append(
                {
                    "kind": group.kind,
                    "window": group.window,
                    "block_bytes": group.block_bytes,
                    "num_blocks": {**asdict(counts), "total": counts.total},
                    "num_tokens": {name: count * blocks.block_size for name, count in asdict(counts).items()},
                    "committed_bytes": pool.num_blocks * group.block_bytes,
                }
            )
        return {
            "block_size": blocks.block_size,
            "kv_tokens": (blocks.num_blocks[0] - 1) * blocks.block_size,
            "committed_bytes": blocks.layout.bytes_for(blocks.num_blocks),
            "table_bytes": self.scheduler.table.num_bytes,
            "groups": groups,
        }
