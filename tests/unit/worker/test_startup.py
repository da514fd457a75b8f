"""The phases on a small dummy model: with and without reserve/commit, the same tokens; the cap is kept; refusals come first."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from brim.config.model_source import open_model
from brim.config.resolve import resolve
from brim.engine.block_manager import BlockManager
from brim.engine.core import EngineCore
from brim.engine.limits import EngineLimits
from brim.engine.messages import AddRequest
from brim.engine.sampling_params import SamplingParams
from brim.engine.scheduler import Scheduler
from brim.engine.sequence_table import SequenceTable
from brim.errors import MemoryBudgetError
from brim.kernels.select import select_kernels
from brim.platforms.cpu import CpuPlatform
from brim.worker.device_worker import DeviceWorker
from brim.worker.startup import start_worker

CONFIG = {
    "model_type": "gemma3_text",
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "sliding_window": 32,
    "max_position_embeddings": 512,
    "query_pre_attn_scalar": 32,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
Start = Callable[..., DeviceWorker]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def build(reserve_commit: bool = True, **settings: Any) -> DeviceWorker:
        platform = CpuPlatform()
        if not reserve_commit:
            platform.capabilities = replace(platform.capabilities, reserve_commit=False, arena_backend="static")
        flags = {"model": str(tmp_path), "load_format": "dummy", "max_model_len": 256, "max_num_seqs": 3, **settings}
        config = resolve({**flags, "max_num_batched_tokens": 64})
        return start_worker(config, platform, lambda _: select_kernels("cpu").kernels, open_model(config.model), lambda p: None)

    return build


def tokens_of(worker: DeviceWorker) -> list[list[int]]:
    plan = worker.ready.plan
    table = SequenceTable(3, 256, plan.split.layout)
    blocks = BlockManager(plan.split.layout, worker.committed_blocks, table)
    limits = EngineLimits(max_num_seqs=3, max_num_batched_tokens=64, max_model_len=256)
    core = EngineCore(Scheduler(limits, blocks, table), worker, vocab_size=1000)
    for i, length in enumerate((5, 90, 40)):
        prompt = [(7 * i + 3 * j) % 997 + 2 for j in range(length)]
        core.add(AddRequest(str(i), prompt, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), 0.0))
    found: dict[str, list[int]] = {str(i): [] for i in range(3)}
    while core.has_work:
        for output in core.step():
            assert output.error is None
            found[output.request_id] += output.new_token_ids
    return list(found.values())


def test_without_reserve_and_commit_the_cache_is_built_twice_and_the_tokens_are_the_same(start: Start) -> None:
    growing, static = start(), start(reserve_commit=False)
    assert growing.ready.plan.kv_tokens == static.ready.plan.kv_tokens
    assert growing.num_programs == static.num_programs == 6
    assert tokens_of(growing) == tokens_of(static)
    growing.close()
    static.close()


def test_phases_stand_in_the_order_of_the_documentation(start: Start) -> None:
    worker = start()
    names = [record.name for record in worker.phase_records]
    assert names == ["open", "load", "reserve", "warm", "measure", "capture", "commit", "prove"]
    worker.close()


def test_a_cap_is_kept_and_filled(start: Start) -> None:
    room = CpuPlatform().reading().ours_bytes + (128 << 20)
    worker = start(memory=str(room))
    plan = worker.ready.plan
    assert worker.ready.peak_bytes <= plan.cap_bytes == room
    assert worker.ledger.held_bytes <= room
    assert worker.ledger.headroom_bytes < 8 << 20
    worker.close()


def test_what_does_not_fit_is_refused_before_weights_are_read(start: Start) -> None:
    room = CpuPlatform().reading().ours_bytes + (2 << 20)
    with pytest.raises(MemoryBudgetError) as caught:
        start(memory=str(room))
    assert caught.value.nearest and caught.value.ledger is not None
    assert caught.value.ledger.bytes_of("weights") > 0


def test_a_very_short_context_starts(start: Start) -> None:
    """The fabricated steps have no more history than a request can have."""
    worker = start(max_model_len=16)
    assert worker.ready.plan.limits.max_model_len == 16
    worker.close()
