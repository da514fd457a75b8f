"""Both ends of captured decode steps against the reference, turn after turn."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from brim.kernels.base import FedStep, HostFeed, SamplingBatch
from brim.kernels.torch_ref import TorchKernels
from brim.kernels.triton.chip import Chip
from brim.kernels.triton.kernels import TritonKernels
from brim.kernels.triton.scratch import KernelLimits

from .helpers import AttentionShape, kernels_for

ROWS, BLOCK_SIZE = 7, 4
LENGTHS = [[1, 4, 5, 17, 0, 0, 0], [5000, 2, 16, 3, 8, 9, 0]]  # of the sets; 0: padding


def feed_of(num_groups: int, device: str) -> HostFeed:
    """Two sets; ids of even rows are known, the others were sampled before."""
    sets, blocks = len(LENGTHS), 1300
    known = torch.randint(0, 900, (sets, ROWS))
    known[:, 1::2] = -1
    floats = torch.rand(3, sets, ROWS)
    return HostFeed(
        turn=torch.zeros(2, dtype=torch.int32, device=device),
        ids=known,
        rows=torch.stack([torch.randperm(ROWS) for _ in range(sets)]),
        seeds=torch.randint(-(2**62), 2**62, (sets, ROWS)),
        seq_lens=torch.tensor(LENGTHS, dtype=torch.int32),
        top_k=torch.randint(0, 50, (sets, ROWS), dtype=torch.int32),
        temperature=floats[0],
        top_p=floats[1],
        min_p=floats[2],
        tables=tuple(torch.randint(0, 2**20, (sets, ROWS, blocks), dtype=torch.int32) for _ in range(num_groups)),
        sampled=torch.full((sets, ROWS), -7),
    )


def step_of(feed: HostFeed, device: str) -> FedStep:
    """What is written holds -5 before."""

    def old(dtype: torch.dtype = torch.int64, *size: int) -> Tensor:
        return torch.full((ROWS, *size), -5, dtype=dtype, device=device)

    ints, real = torch.int32, torch.float32
    return FedStep(
        old(), old(), old(), old(ints), tuple(old() for _ in feed.tables),
        tuple(old(ints, table.shape[2]) for table in feed.tables),
        SamplingBatch(old(real), old(ints), old(real), old(real), old(), old(), all_greedy=False),
        torch.arange(100, 100 + ROWS + 1, device=device), BLOCK_SIZE,
    )  # fmt: skip


def tensors_of(values: Any) -> list[Tensor]:
    """All tensors of a dataclass, nested ones too."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, tuple):
        return [tensor for value in values for tensor in tensors_of(value)]
    if hasattr(values, "__dataclass_fields__"):
        return tensors_of(tuple(getattr(values, field.name) for field in fields(values)))
    return []


def test_nothing_starts_before_the_inputs_are_there() -> None:
    """Attention and rotary embedding read lengths and places before they wait: on an H100, small models got the last step's."""
    early: list[tuple[str, bool]] = []

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        early.append((kernel.fn.__name__, options.get("launch_pdl", False)))

    kernels = TritonKernels("meta", KernelLimits(ROWS, 2, 1, 32, 100), Chip(132, True, dependent_launch=True), launch)
    feed, hidden = feed_of(1, "cpu"), torch.empty(ROWS, 64, device="meta")
    step = step_of(feed, "cpu")
    kernels.begin_decodes(feed, step)
    kernels.embed(step.ids, kernels.new_linear(100, 64, torch.float32), 1.0, hidden)
    kernels.rms_norm(hidden, hidden[0], 1e-6, hidden)
    assert early == [("begin_decodes_kernel", False), ("gather_kernel", False), ("rms_norm_kernel", True)]


@pytest.mark.parametrize("num_groups", [1, 2])
def test_two_turns(device: str, num_groups: int) -> None:
    """Rows of a table past a length stay as they are, so does what no row of the step owns."""
    shape = AttentionShape([1], [1], 2, 1, 32)
    feed = feed_of(num_groups, device)
    if device != "cpu":
        locked = {field.name: getattr(feed, field.name) for field in fields(feed) if field.name not in ("turn", "tables")}
        feed = replace(
            feed, tables=tuple(table.pin_memory() for table in feed.tables), **{k: v.pin_memory() for k, v in locked.items()}
        )
    other = replace(feed, turn=feed.turn.clone(), sampled=feed.sampled.clone())
    ours, reference = (step_of(feed, device) for _ in range(2))
    hidden = torch.randn(ROWS, 48, device=device).to(torch.float16)
    hidden[2, 3], hidden[5, 40] = float("nan"), float("-inf")
    for turn in (0, 1, 0):
        ids = torch.randint(0, 900, (ROWS,), device=device)
        assert feed.turn.tolist() == [turn, 0]
        for kernels, each, step in ((kernels_for(device, shape), feed, ours), (TorchKernels(device), other, reference)):
            kernels.begin_decodes(each, step)
            kernels.end_decodes(each, step, hidden, ids)
        if device != "cpu":
            torch.cuda.synchronize()
        for found, expected in zip(tensors_of(ours), tensors_of(reference), strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(feed.sampled, other.sampled)
        assert (feed.sampled[turn] == -1).tolist() == [row in (2, 5) for row in range(ROWS)]
