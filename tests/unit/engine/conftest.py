"""A whole engine over the fake executor, small enough that every block matters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from brim.engine.block_manager import BlockManager
from brim.engine.chunk_pace import ChunkPace
from brim.engine.core import EngineCore
from brim.engine.fake_executor import FakeExecutor
from brim.engine.kv_guard import KVGuard
from brim.engine.limits import EngineLimits
from brim.engine.messages import AddRequest, SequenceOutput
from brim.engine.sampling_params import SamplingParams
from brim.engine.scheduler import Scheduler
from brim.engine.sequence_table import SequenceTable
from brim.memory.kv_layout import KVGroup, KVLayout

VOCAB_SIZE = 50
EOS = 3


def layout_of(windows: Sequence[int], block_size: int = 4) -> KVLayout:
    """One KV group a window (0: full attention), with different block bytes."""
    groups = tuple(KVGroup("sliding" if w else "full", (i,), w, 64 * (i + 1)) for i, w in enumerate(windows))
    return KVLayout(groups, block_size, 1, 1, 1)


@dataclass
class Rig:
    """An engine, and what its requests have got so far."""

    core: EngineCore
    executor: FakeExecutor
    requests: dict[str, AddRequest] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    ends: dict[str, SequenceOutput] = field(default_factory=dict)
    num_steps: int = 0

    @property
    def scheduler(self) -> Scheduler:
        return self.core.scheduler

    def add(self, request_id: str, prompt: Sequence[int], params: SamplingParams | None = None, priority: int = 0) -> None:
        params = params or SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        self.requests[request_id] = AddRequest(request_id, list(prompt), params, 0.0, priority)
        self.tokens[request_id] = []
        self.core.add(self.requests[request_id])

    def step(self) -> list[SequenceOutput]:
        outputs = self.core.step()
        self.num_steps += 1
        for output in outputs:
            assert output.request_id not in self.ends, "an output after the end"
            self.tokens[output.request_id] += output.new_token_ids
            if output.finish_reason:
                self.ends[output.request_id] = output
        self.scheduler.check_integrity()
        return outputs

    def run(self, max_steps: int = 2000) -> None:
        while self.core.has_work:
            self.step()
            assert self.num_steps < max_steps, "somebody starves"
        assert set(self.ends) == set(self.requests)
        assert all(counts.used == 0 for counts in self.scheduler.blocks.counts)

    def expected(self, request_id: str) -> list[int]:
        request = self.requests[request_id]
        params = request.params
        total = min(len(request.prompt_ids) + (params.max_tokens or 1 << 30), self.scheduler.limits.max_model_len)
        return self.executor.alone(request.prompt_ids, params, seed=params.seed or 0, max_total_tokens=total)


def make_rig(
    windows: Sequence[int] = (0,),
    *,
    num_blocks: int | Sequence[int] = 64,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 16,
    max_model_len: int = 64,
    chunked: bool = True,
    depth: int = 1,
    prefix_caching: bool = True,
    faults: Mapping[int, Exception] | None = None,
    check_interval_steps: int = 64,
    max_failed_steps: int = 5,
    unit_blocks: int = 1,
    vocab_size: int = VOCAB_SIZE,
    clock: Callable[[], float] = lambda: 0.0,
) -> Rig:
    layout = layout_of(windows)
    counts = [num_blocks] * len(windows) if isinstance(num_blocks, int) else list(num_blocks)
    limits = EngineLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        enable_chunked_prefill=chunked,
        pipeline_depth=depth,
    )
    table = SequenceTable(max_num_seqs, max_model_len, layout)
    blocks = BlockManager(layout, counts, table, enable_prefix_caching=prefix_caching)
    scheduler = Scheduler(limits, blocks, table, ChunkPace(limits, clock))
    executor = FakeExecutor(layout, counts, vocab_size=vocab_size, eos_token_ids=(EOS,), faults=faults, unit_blocks=unit_blocks)
    guard = KVGuard(scheduler, executor, check_interval_steps=check_interval_steps)
    core = EngineCore(
        scheduler, executor, vocab_size=vocab_size, eos_token_ids=(EOS,), guard=guard, max_failed_steps=max_failed_steps
    )
    return Rig(core, executor)


@pytest.fixture(scope="session")
def rig() -> Callable[..., Rig]:
    """Makes a Rig; see make_rig."""
    return make_rig


@pytest.fixture(scope="session")
def make_layout() -> Callable[..., KVLayout]:
    """Makes a KVLayout from windows; see layout_of."""
    return layout_of
