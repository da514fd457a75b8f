"""The engine process's loop and what crosses its socket; whole processes are in tests/e2e."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from brim.config.schema import BrimConfig, MemoryConfig, MemoryRequest, ModelConfig, ServerConfig
from brim.engine.engine_process import EngineLaunch, describe_failure, serve_engine
from brim.engine.messages import (
    AbortRequest,
    AddRequest,
    ControlCall,
    ControlReply,
    EngineReady,
    FromEngine,
    StepOutputs,
    ToEngine,
)
from brim.engine.sampling_params import SamplingParams
from brim.engine.supervisor import RestartPolicy, named_error
from brim.engine.transport import FrontChannel, ZmqEngineChannel
from brim.errors import DeviceLost, EngineError, MemoryBudgetError, PromptTooLong
from brim.memory.ledger import Ledger, LedgerLine

GREEDY = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logit_bias={3: 1.5}, stop=("a",), stop_token_ids=(9,))


class ListChannel:
    """An EngineChannel of lists: each blocking receive gives the next batch; a shutdown when there is none."""

    def __init__(self, *batches: list[ToEngine]) -> None:
        self.batches = deque(batches)
        self.sent: list[FromEngine] = []
        self.num_blocked = 0

    def receive(self, *, wait_s: float) -> list[ToEngine]:
        if not wait_s:
            return []
        self.num_blocked += 1
        return self.batches.popleft() if self.batches else [ControlCall(99, "shutdown")]

    def send(self, message: FromEngine) -> None:
        self.sent.append(message)

    def close(self) -> None:
        pass

    def tokens(self, request_id: str) -> list[int]:
        steps = [message.outputs for message in self.sent if isinstance(message, StepOutputs)]
        return [
            token for outputs in steps for output in outputs if output.request_id == request_id for token in output.new_token_ids
        ]


def test_the_loop_serves_and_blocks_only_when_idle(rig: Callable[..., Any]) -> None:
    engine = rig()
    add = AddRequest("a", [5, 6, 7], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True), 0.0)
    channel = ListChannel([add], [ControlCall(1, "stats"), ControlCall(2, "memory"), ControlCall(3, "nonsense")])
    serve_engine(engine.core, {"vocab_size": 50}, channel)
    assert channel.sent[0] == EngineReady({"vocab_size": 50})
    assert channel.tokens("a") == engine.executor.alone([5, 6, 7], add.params, seed=0, max_total_tokens=8)
    assert channel.num_blocked == 3
    stats, memory, nonsense, bye = [message for message in channel.sent if isinstance(message, ControlReply)]
    assert stats.result["num_requests"] == 1
    assert stats.result["kv"]["groups"] == memory.result["kv"]["groups"]
    assert "nonsense" in (nonsense.error or "")
    assert bye == ControlReply(99, {})


def test_an_idle_engine_follows_its_neighbours(rig: Callable[..., Any]) -> None:
    engine = rig(num_blocks=40)
    engine.executor.pressure = 20 * 64
    channel = ListChannel([], [AddRequest("a", [5, 6, 7], GREEDY, 0.0)])
    serve_engine(engine.core, {}, channel)
    assert engine.executor.committed == (20,) == engine.scheduler.blocks.num_blocks
    assert channel.tokens("a")[-1] == 9, "served as before, to its stop id"


def test_an_abort_ends_a_sequence(rig: Callable[..., Any]) -> None:
    channel = ListChannel([AddRequest("a", [5], GREEDY, 0.0), AbortRequest("a"), AbortRequest("unknown")])
    serve_engine(rig().core, {}, channel)
    (step,) = [message for message in channel.sent if isinstance(message, StepOutputs)]
    assert [output.finish_reason for output in step.outputs] == ["abort"]


def test_a_drain_refuses_what_comes_later(rig: Callable[..., Any]) -> None:
    channel = ListChannel([ControlCall(1, "drain")], [AddRequest("a", [5], GREEDY, 0.0)])
    serve_engine(rig().core, {}, channel)
    (step,) = [message for message in channel.sent if isinstance(message, StepOutputs)]
    assert "shutting down" in (step.outputs[0].error or "")


@pytest.mark.parametrize("fault", [DeviceLost("gone"), RuntimeError("broken")])
def test_what_the_core_cannot_survive_leaves_the_loop(rig: Callable[..., Any], fault: Exception) -> None:
    engine = rig(faults={0: fault}, max_failed_steps=1)
    expected = type(fault) if isinstance(fault, DeviceLost) else EngineError
    with pytest.raises(expected):
        serve_engine(engine.core, {}, ListChannel([AddRequest("a", [5], GREEDY, 0.0)]))


@pytest.mark.parametrize("use_ipc", [True, False])
def test_messages_cross_a_private_socket_unchanged(use_ipc: bool) -> None:
    messages: list[ToEngine] = [AddRequest("ä#0", [1, 2], GREEDY, 1.5, -3), AbortRequest("b"), ControlCall(7, "stats", {"a": 1})]
    answer = ControlReply(7, {"count": 3, "ratio": 0.5, "list": [1, None]})

    async def front(channel: FrontChannel) -> FromEngine:
        for message in messages:
            channel.send(message)
        return await asyncio.wait_for(channel.receive(), 5)

    async def both() -> None:
        channel = FrontChannel(use_ipc=use_ipc)
        assert bool(channel.server_key) == (not use_ipc)
        folder = Path(channel.address.removeprefix("ipc://")).parent
        assert not use_ipc or stat.S_IMODE(folder.stat().st_mode) == 0o700
        got: list[ToEngine] = []
        engine = threading.Thread(target=answer_all, args=(channel.address, channel.server_key, got))
        engine.start()
        assert await front(channel) == answer
        await asyncio.to_thread(engine.join, 5)
        assert got == messages
        channel.close()
        assert not use_ipc or not folder.exists()

    def answer_all(address: str, server_key: str, got: list[ToEngine]) -> None:
        channel = ZmqEngineChannel(address, server_key)
        while len(got) < len(messages):
            got += channel.receive(wait_s=5.0)
        assert channel.receive(wait_s=0.0) == []
        channel.send(ControlReply(7, {"count": np.int64(3), "ratio": np.float64(0.5), "list": [1, None]}))
        channel.close()

    asyncio.run(both())


def test_a_folder_of_any_depth_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))

    async def address() -> str:
        with contextlib.closing(FrontChannel()) as channel:
            return channel.address

    assert asyncio.run(address()).startswith("tcp://127.0.0.1:")
    assert list(deep.iterdir()) == []


def test_strangers_at_the_loopback_port_get_nothing_and_block_nobody() -> None:
    """One that knows no key, one that has a wrong one, one that only connects: then the engine."""

    async def talk() -> FromEngine:
        channel = FrontChannel(use_ipc=False)
        port = int(channel.address.rpartition(":")[2])
        others = [ZmqEngineChannel(channel.address), ZmqEngineChannel(channel.address, zmq.curve_keypair()[0].decode())]
        with socket.create_connection(("127.0.0.1", port)):
            for other in others:
                other.send(ControlReply(666, {}))
            await asyncio.sleep(0.1)
            engine = ZmqEngineChannel(channel.address, channel.server_key)
            engine.send(ControlReply(1, {}))
            answer = await asyncio.wait_for(channel.receive(), 5)
        channel.close()
        for one in (engine, *others):
            one.close(linger_ms=0)
        return answer

    assert asyncio.run(talk()) == ControlReply(1, {})


def test_the_launch_crosses_stdin_unchanged() -> None:
    config = BrimConfig(
        model=ModelConfig(model="demo", max_model_len="auto", served_model_name=("a", "b")),
        memory=MemoryConfig(memory=MemoryRequest("fraction", per_million=850_000)),
        server=ServerConfig(port=0),
        sources={"port": "flag"},
    )
    launch = EngineLaunch("ipc:///x", os.getpid(), config, "key")
    line = msgspec.json.encode(launch)
    assert b"\n" not in line
    assert msgspec.json.decode(line, type=EngineLaunch) == launch


def test_errors_cross_with_what_they_carry() -> None:
    ledger = Ledger(10, 20, (LedgerLine("weights", "model", 15, "computed"),))
    error = MemoryBudgetError("Too small.", ledger=ledger, nearest=["--memory 1GiB"])
    wire = msgspec.msgpack.encode(describe_failure(error))
    back = named_error(msgspec.msgpack.decode(wire, type=type(describe_failure(error))))
    assert isinstance(back, MemoryBudgetError)
    assert (str(back), back.ledger, back.nearest) == (str(error), ledger, ("--memory 1GiB",))
    assert isinstance(named_error(describe_failure(PromptTooLong("long"))), PromptTooLong)
    odd = named_error(msgspec.structs.replace(describe_failure(error), kind="Sequence"))
    assert type(odd) is EngineError


def test_pauses_between_restarts_grow_to_a_limit() -> None:
    policy = RestartPolicy(first_pause_s=0.5, most_pause_s=3.0)
    assert [policy.pause_s(count) for count in (1, 2, 3, 4, 1000)] == [0.5, 1.0, 2.0, 3.0, 3.0]
