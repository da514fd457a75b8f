"""Prefill attention for Hopper, on a model of the chip: right results in any order of what runs at once, and the model finds
faults that are put in. On the chip itself: tests/device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.unit.kernels_triton.gluon_model import GluonFault, Machine
from tests.unit.kernels_triton.helpers import AttentionShape, assert_close, attention_case, rows_of
from torch import Tensor

from brim.kernels.torch_ref import TorchKernels
from brim.kernels.triton import hopper_attention
from brim.kernels.triton.hopper_launch import HopperLauncher
from brim.kernels.triton.tuning import HOPPER_TILE, AttentionTile

SOURCE = Path(hopper_attention.__file__)
TILES = [HOPPER_TILE, AttentionTile(128, 64, 4, 3), AttentionTile(128, 64, 4, 4)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def attend(machine: Machine, shape: AttentionShape, tile: AttentionTile, least_queries: int = 0) -> tuple[Tensor, Tensor]:
    """What the kernel left where there was NaN, and what is right."""
    cache, batch = attention_case(shape, torch.bfloat16, "cpu")
    q = rows_of(sum(shape.query_lens), shape.heads * shape.head_dim, torch.bfloat16, "cpu", pad=32)
    expected = rows_of(*q.shape, torch.float32, "cpu", fill=float("nan"))
    TorchKernels("cpu").attention(q.float(), cache.float(), batch, 0.09, 0.0, expected)
    out = rows_of(*q.shape, torch.bfloat16, "cpu", pad=8, fill=float("nan"))
    launcher = HopperLauncher(machine.launch, max(4, len(shape.seq_lens)), tile)
    assert launcher.suits(q, cache, batch)
    launcher.launch(q, cache, batch, 0.09, out, least_queries=least_queries)
    return out, expected


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.keys}x{tile.stages}")
@pytest.mark.parametrize("heads", [(2, 1), (4, 2), (4, 1), (8, 1)], ids=str)
@pytest.mark.parametrize("lengths", [([129], [129]), ([100], [612]), ([70, 200, 64], [70, 333, 400])], ids=str)
def test_it_agrees_with_the_reference(lengths: tuple[list[int], list[int]], heads: tuple[int, int], tile: AttentionTile) -> None:
    out, expected = attend(Machine(SOURCE, seed=1), AttentionShape(*lengths, *heads, 128), tile)
    assert_close(out, expected)


@pytest.mark.parametrize("seed", range(12))
def test_in_any_order_of_copies_and_groups(seed: int) -> None:
    tile = TILES[seed % 3]
    out, expected = attend(Machine(SOURCE, seed), AttentionShape([300, 65], [555, 130], 2, 1, 128), tile)
    assert_close(out, expected)


@pytest.mark.parametrize("block_size", [8, 32, 64])
def test_blocks_of_other_sizes(block_size: int) -> None:
    shape = AttentionShape([150], [333], 4, 1, 128, block_size=block_size)
    out, expected = attend(Machine(SOURCE), shape, TILES[1])
    assert_close(out, expected)


def test_sequences_of_one_new_token_are_left_alone() -> None:
    """Where another kernel takes those."""
    shape = AttentionShape([1, 130, 1, 64], [200, 130, 40, 400], 4, 2, 128)
    out, expected = attend(Machine(SOURCE), shape, HOPPER_TILE, least_queries=2)
    alone = torch.tensor([0, 131])
    assert out[alone].isnan().all()
    others = torch.tensor([row for row in range(len(out)) if row not in alone])
    assert_close(out[others], expected[others])


FAULTS = {  # what is done to the source
    "keys are not waited for": ("mbarrier.wait(k_ready.index((i + 2) % STAGES)", "(lambda *a, **b: 0)(k_ready.index(0)"),
    "values are not waited for": ("mbarrier.wait(v_ready.index(stage), (i // STAGES) & 1)", "pass"),
    "the last values are not waited for": ("mbarrier.wait(v_ready.index(last % STAGES), (last // STAGES) & 1)", "pass"),
    "keys are given up too early": (
        "scores = warpgroup_mma_wait(2, deps=[scores])\n        mbarrier.arrive(k_free.index(next_stage))",
        "mbarrier.arrive(k_free.index(next_stage))\n        scores = warpgroup_mma_wait(2, deps=[scores])",
    ),
    "values are given up too early": (
        "deps=[low_sum, high_sum, weights, following, total])\n        mbarrier.arrive(v_free.index(stage))",
        "deps=[mbarrier.arrive(v_free.index(stage)) or low_sum, high_sum, weights, following, total])",
    ),
    "values are never given up": ("mbarrier.arrive(v_free.index(stage))", "pass"),
    "the copies wait for no one": ("mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)", "pass"),
    "the copies wait for the wrong phase": ("((step // STAGES) & 1) ^ 1)", "(step // STAGES) & 1)"),
    "the copies expect too little": ("KEYS * HEAD_DIM * 2)", "KEYS * HEAD_DIM)"),
    "scores are read too early": ("warpgroup_mma_wait(2, deps=[scores])", "warpgroup_mma_wait(3, deps=[scores])"),
    "one group of warps frees for both": ("mbarrier.init(k_free.index(stage), count=2)", "k_free.index(stage).init(1)"),
    "queries are not fenced": ("    fence_async_shared()\n    s_row", "    s_row"),
    "the tail of the values stays": ("if rows_left < KEYS:", "if False:"),
    "a token does not see itself": ("place[None, :] <= query_pos", "place[None, :] < query_pos"),
    "a tile too few is masked": ("plain_tiles = (first_pos + 1) // KEYS", "plain_tiles = (first_pos + KEYS) // KEYS"),
    "the sum does not shrink": ("total * shrink + ", "total + "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_model_finds(fault: str) -> None:
    """In one of a few orders: the kernel's own tests would fail with it."""
    before, after = FAULTS[fault]
    assert before in SOURCE.read_text()
    for seed in range(8):
        machine = Machine(SOURCE, seed, lambda source: source.replace(before, after))
        try:
            out, expected = attend(machine, AttentionShape([140, 70], [500, 333], 2, 1, 128), AttentionTile(128, 64, 4, 3))
            assert_close(out, expected)
        except (GluonFault, AssertionError):
            return
    pytest.fail("the model found nothing")
