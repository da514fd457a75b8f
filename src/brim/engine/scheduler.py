"""Which tokens the next step computes. Owns continuous batching: admission, decodes and prefill chunks, preemption, and what a
step's result means for its sequences. Never touches the device.

    schedule()   running sequences in order of age: each takes its one token or its next chunk (of a prompt longer than a step,
                 beside decodes, no more than `chunk_pace` allows), and the blocks for it; one
                 that cannot get a block preempts the youngest, so the oldest always moves. Then waiting ones, first come first
                 served, while rows, tokens and the blocks of their whole next chunk are there.
    update()     settles a step: appends tokens, stops sequences, makes full blocks findable, releases blocks.
    cancel_all() forgets the steps in flight, which did not run; the same work is planned again.

With pipeline_depth d, d steps may be planned before the first is settled. Rows and blocks of a sequence that ends while steps
that include it are in flight come back when the last of them is settled.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from brim.engine.block_manager import BlockManager
from brim.engine.chunk_pace import ChunkBudget, ChunkPace
from brim.engine.limits import EngineLimits
from brim.engine.messages import FinishReason, PositionLogprobs, SequenceOutput
from brim.engine.sequence import Sequence, SequenceStatus
from brim.engine.sequence_table import SequenceTable
from brim.engine.step import BlockCopy, StepPlan, StepResult, TokenLogprobs
from brim.engine.step_builder import StepBuilder
from brim.engine.waiting_queue import WaitingQueue


@dataclass(slots=True)
class SchedulerCounters:
    """Monotone counts since the start, for /metrics."""

    num_steps: int = 0
    num_cancelled_steps: int = 0
    num_preemptions: int = 0
    num_scheduled_tokens: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_prefix_query_tokens: int = 0


class Scheduler:
    """Continuous batching over one block manager and one sequence table."""

    def __init__(self, limits: EngineLimits, blocks: BlockManager, table: SequenceTable, pace: ChunkPace | None = None) -> None:
        self.limits = limits
        self._pace = pace or ChunkPace(limits)
        self.blocks = blocks
        self.table = table
        self.counters = SchedulerCounters()
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []  # by order: the oldest first
        self._by_id: dict[str, Sequence] = {}
        self._in_flight: dict[int, StepPlan] = {}
        self._ended: list[tuple[int, int]] = []  # (last step id, row): to release when that step is settled
        self._next_step_id = 0

    # -- what is there

    @property
    def num_running(self) -> int:
        """Sequences that have a row."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a row or blocks, preempted ones included."""
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        """Steps planned and not yet settled."""
        return len(self._in_flight)

    @property
    def has_unfinished(self) -> bool:
        """True where a sequence is not finished or a step is in flight."""
        return bool(self._by_id or self._in_flight)

    def has_request(self, request_id: str) -> bool:
        """True where the id belongs to an unfinished sequence."""
        return request_id in self._by_id

    def least_blocks(self, num_tokens: int = 1) -> tuple[int, ...]:
        """Blocks of each group, block 0 included, with which every unfinished sequence, and one of num_tokens, can still run to
        its end, one by one."""
        longest = max((seq.max_total_tokens - 1 for seq in self._by_id.values()), default=1)
        longest = max(longest, num_tokens - 1)
        return tuple(self.blocks.blocks_for(group, longest) + 1 for group in self.blocks.layout.groups)

    # -- requests

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that has been checked to fit."""
        assert sequence.request_id not in self._by_id
        self._by_id[sequence.request_id] = sequence
        self._waiting.push(sequence)
        self.counters.num_prompt_tokens += sequence.num_prompt_tokens

    def abort(self, request_id: str) -> SequenceOutput | None:
        """End a sequence wherever it is; None where the id is unknown."""
        return self.finish(request_id, "abort")

    def finish(
        self, request_id: str, reason: FinishReason, error: str | None = None, error_kind: str | None = None
    ) -> SequenceOutput | None:
        """End a sequence from outside and say why; None where the id is unknown."""
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return None
        self._finish(sequence)
        return SequenceOutput(
            request_id, [], reason, num_cached_tokens=sequence.num_cached_tokens, error=error, error_kind=error_kind
        )

    def next_in_line(self) -> Sequence | None:
        """The sequence that must move first: the oldest running one, else the first that waits."""
        return self._running[0] if self._running else self._waiting.first()

    # -- planning a step

    def schedule(self) -> StepPlan | None:
        """The next step, or None where nothing can be computed now (or pipeline_depth steps are in flight)."""
        if len(self._in_flight) >= self.limits.pipeline_depth:
            return None
        builder = StepBuilder(self._next_step_id)
        num_decodes = sum([s.num_tokens + s.num_pending_tokens - s.num_computed_tokens == 1 for s in self._running])
        budget = self._pace.budget(num_decodes, len(self._waiting))
        if self._schedule_running(builder, budget):
            self._admit(builder, budget)
        if builder.is_empty:
            return None
        plan = builder.build(self.table)
        self._pace.planned(num_decodes, budget)
        self._in_flight[plan.step_id] = plan
        self._next_step_id += 1
        self.counters.num_steps += 1
        self.counters.num_scheduled_tokens += plan.num_tokens
        return plan

    def _schedule_running(self, builder: StepBuilder, budget: ChunkBudget) -> bool:
        """Every running sequence, oldest first. False where one lacked blocks."""
        running, add_decode = self._running, builder.add_decode
        all_served = True
        index = 0
        while index < len(running):  # preemption takes from the end
            seq = running[index]
            index += 1
            pending = seq.num_pending_tokens
            total = seq.num_tokens + pending
            missing = total - seq.num_computed_tokens
            if pending and (total >= seq.max_total_tokens or (seq.may_be_special and seq.needs_host_tokens)):
                continue
            if missing == 1:
                if seq.num_computed_tokens >= seq.num_slots and not self._make_room(seq):
                    all_served = False
                else:
                    add_decode(seq)
            elif (most := budget.room(seq)) > 0:
                chunk = self._room_for_chunk(seq, min(missing, most))
                if chunk:
                    self.blocks.append_slots(seq, chunk)
                    builder.add_chunk(seq, chunk)
                    budget.take(seq, chunk)
                else:
                    all_served = False
        return all_served

    def _make_room(self, sequence: Sequence) -> bool:
        """One more slot for a decode, preempting younger sequences for it; False: not in this step."""
        while not self.blocks.append_slots(sequence, 1):
            if self._ended or not self._preempt_youngest(sequence):
                return False
        return True

    def _room_for_chunk(self, sequence: Sequence, num_tokens: int) -> int:
        """How much of a running sequence's next chunk has blocks; at least something, where preempting younger ones gives it."""
        while not (room := self.blocks.max_new_tokens(sequence, num_tokens)):
            if self._ended or not self._preempt_youngest(sequence):
                return 0
        return room

    def _preempt_youngest(self, sequence: Sequence) -> bool:
        """Preempt the youngest running sequence unless it is this one; False where there is none younger."""
        if self._running[-1] is sequence:
            return False
        self._preempt(self._running.pop())
        return True

    def _preempt(self, victim: Sequence) -> None:
        victim.status = SequenceStatus.PREEMPTED
        victim.num_preemptions += 1
        self.counters.num_preemptions += 1
        self._end_row(victim)
        self._waiting.push(victim)

    def _admit(self, builder: StepBuilder, budget: ChunkBudget) -> None:
        """Waiting sequences in order, until the first that finds no row, tokens or blocks: nobody overtakes it."""
        limits = self.limits
        while self.table.num_free_rows and (seq := self._waiting.first()) is not None and (most := budget.room(seq)) > 0:
            if seq.last_step_id in self._in_flight:
                break
            prefix = self.blocks.find_prefix(seq)
            missing = seq.num_tokens - prefix.num_tokens
            chunk = min(missing, most)
            if chunk < min(missing, limits.max_num_batched_tokens) and not limits.enable_chunked_prefill:
                break
            room = self.blocks.max_new_tokens(seq, chunk, prefix)
            if room < chunk and (self._running or self._ended or room < 1):
                break
            self._waiting.pop()
            self.table.take_row(seq)
            self.blocks.allocate(seq, room, prefix)
            if seq.status is SequenceStatus.WAITING:
                seq.num_cached_tokens = prefix.num_tokens
                self.counters.num_prefix_query_tokens += seq.num_tokens
                self.counters.num_prefix_hit_tokens += prefix.num_tokens
            seq.status = SequenceStatus.RUNNING
            insort(self._running, seq, key=lambda s: s.order)
            builder.add_chunk(seq, room)
            budget.take(seq, room)

    # -- settling a step

    def update(self, plan: StepPlan, result: StepResult) -> list[SequenceOutput]:
        """Settle the oldest step in flight: what each of its sequences got from it."""
        assert next(iter(self._in_flight)) == plan.step_id, "steps are settled in order"
        del self._in_flight[plan.step_id]
        self._pace.settled()
        outputs: list[SequenceOutput] = []
        for index, reason in result.failed.items():
            output = self.finish(plan.sequences[index].request_id, "error", reason, "RequestFailed")
            if output is not None:
                outputs.append(output)
        running = SequenceStatus.RUNNING
        for seq, count in zip(plan.sequences, plan.query_lens.tolist(), strict=True):
            if seq.status is running:
                seq.num_settled_tokens += count
                if seq.num_settled_tokens >= seq.next_settle_tokens:
                    self.blocks.settle(seq)
        if result.prompt_logprobs:
            self._collect_prompt_logprobs(plan, result)
        rows = plan.rows[plan.sample_indices]
        self.table.last_token[rows] = result.token_ids
        self.table.num_tokens[rows] = (plan.start_positions + plan.query_lens)[plan.sample_indices] + 1
        self._append_tokens(plan, result, outputs)
        self._release_ended()
        return outputs

    def _append_tokens(self, plan: StepPlan, result: StepResult, outputs: list[SequenceOutput]) -> None:
        sequences, logprobs = plan.sequences, result.logprobs
        finished, preempted = SequenceStatus.FINISHED, SequenceStatus.PREEMPTED
        num_new = 0
        for sampled, (index, token) in enumerate(zip(plan.sample_indices.tolist(), result.token_ids.tolist(), strict=True)):
            seq = sequences[index]
            seq.num_pending_tokens -= 1
            if seq.status is finished or (seq.status is preempted and seq.prompt_logprobs is not None):
                continue  # ended early, or its prompt must be scored again
            num_new += 1
            reason: FinishReason | None = None
            if seq.stop_ids and token in seq.stop_ids and seq.num_tokens - seq.num_prompt_tokens >= seq.params.min_tokens:
                reason = "stop"
            seq.append_token(token)
            if reason is None and seq.num_tokens >= seq.max_total_tokens:
                reason = "length"
            prompt_logprobs = seq.prompt_logprobs
            seq.prompt_logprobs = None
            outputs.append(
                SequenceOutput(
                    seq.request_id,
                    [token],
                    reason,
                    token if reason == "stop" and token in seq.params.stop_token_ids else None,
                    [_on_wire(logprobs[sampled])] if logprobs and sampled in logprobs else None,
                    prompt_logprobs,
                    seq.num_cached_tokens,
                )
            )
            if reason is not None:
                self._finish(seq)
        self.counters.num_output_tokens += num_new

    def _collect_prompt_logprobs(self, plan: StepPlan, result: StepResult) -> None:
        for index, scores in result.prompt_logprobs.items():
            seq = plan.sequences[index]
            if seq.status is SequenceStatus.RUNNING and seq.prompt_logprobs is not None:
                seq.prompt_logprobs.extend(_on_wire(score) for score in scores)

    def cancel_all(self) -> None:
        """The steps in flight did not run, or not to their end: their sequences go back to where they were before them."""
        plans = list(self._in_flight.values())
        self._in_flight.clear()
        self._pace.forget()
        self.counters.num_cancelled_steps += len(plans)
        for plan in plans:
            for seq, count in zip(plan.sequences, plan.query_lens.tolist(), strict=True):
                if seq.status is SequenceStatus.RUNNING:
                    seq.num_computed_tokens -= count
            for index in plan.sample_indices.tolist():
                plan.sequences[index].num_pending_tokens -= 1
        self._release_ended()

    # -- ends

    def _finish(self, sequence: Sequence) -> None:
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
            self._end_row(sequence)
        else:
            self._waiting.note_finished()
        sequence.status = SequenceStatus.FINISHED
        del self._by_id[sequence.request_id]

    def _end_row(self, sequence: Sequence) -> None:
        """Give back row and blocks, now or when the last step that includes the sequence is settled."""
        row = self.blocks.detach(sequence)
        if sequence.last_step_id in self._in_flight:
            self._ended.append((sequence.last_step_id, row))
        else:
            self.blocks.release(row)
            self.table.release_row(row)

    def _release_ended(self) -> None:
        if not self._ended:
            return
        still = []
        for step_id, row in self._ended:
            if step_id in self._in_flight:
                still.append((step_id, row))
            else:
                self.blocks.release(row)
                self.table.release_row(row)
        self._ended = still

    # -- changing the cache's size

    def resize(self, num_blocks: tuple[int, ...]) -> list[BlockCopy]:
        """Bring each KV group to num_blocks[g], preempting the youngest where live blocks do not fit; never the oldest.

        No step may be in flight. The copies must run before ids from `blocks.num_blocks` up are uncommitted.
        """
        assert not self._in_flight, "resize while a step is in flight"
        copies: list[BlockCopy] = []
        for group, target in enumerate(num_blocks):
            while self.blocks.counts[group].used > max(2, target) - 1 and len(self._running) > 1:
                self._preempt(self._running.pop())
        for group, target in enumerate(num_blocks):
            copies += self.blocks.resize(group, target)
        return copies

    def check_integrity(self) -> None:
        """Prove the accounts of blocks, rows and sequences; where nothing is running, that no block is used."""
        self.blocks.check_integrity()
        held_rows = {seq.row for seq in self._running} | {row for _, row in self._ended}
        assert len(held_rows) == len(self._running) + len(self._ended), "a row is held twice"
        assert len(held_rows) + self.table.num_free_rows == self.table.max_num_seqs, "a row is lost"
        assert self.num_running + self.num_waiting == len(self._by_id), "a sequence is lost"
        assert [s.order for s in self._running] == sorted(s.order for s in self._running)
        for seq in self._running:
            assert seq.num_settled_tokens <= seq.num_computed_tokens <= seq.num_tokens + seq.num_pending_tokens
            assert seq.num_computed_tokens <= seq.num_slots
        if not held_rows:
            assert all(counts.used == 0 for counts in self.blocks.counts), "blocks are used by nobody"


def _on_wire(score: TokenLogprobs) -> PositionLogprobs:
    return PositionLogprobs(score.token_id, score.logprob, score.rank, list(score.top_ids), list(score.top_logprobs))
