"""The last layer for the rows that are asked for: their logits are those of a step that computes all."""

from __future__ import annotations

import pytest
import torch

from brim.kernels.base import Kernels

from .conftest import Saved
from .helpers import PagedRun, load_folder, prompt_ids
from .test_workspace import planned_buffers

# new tokens of a chunk, and which of its rows are wanted; rows may repeat, as padding does
CHUNKS = ((20, ()), (1, (0,)), (9, (8, 0, 0)), (1, ()), (28, (27, 3, 26, 3)), (1, (0,)))
FAMILIES = ("llama-rope3-bias-tied", "mistral-window", "qwen2", "qwen3", "qwen3-tied-bias", "gemma3", "gemma3-scaled")


@pytest.mark.parametrize("name", FAMILIES)
def test_wanted_rows_are_those_of_a_whole_step(name: str, saved: Saved, kernels: Kernels) -> None:
    """In buffers that share bytes as the worker's do; steps without a wanted row leave their keys and values for the next."""
    model = load_folder(saved(name, torch.float32)[1], kernels)
    ids = prompt_ids()
    expected = PagedRun(model).logits(ids, [count for count, _ in CHUNKS])
    run, start = PagedRun(model), 0
    run.use_buffers(planned_buffers(model))
    for count, wanted in CHUNKS:
        found = run.chunk(ids, start, count, wanted)
        assert found.shape == (len(wanted), expected.shape[1])
        torch.testing.assert_close(found, expected[[start + row for row in wanted]], rtol=1e-5, atol=1e-5)
        start += count


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_of_last_tokens_alone(name: str, saved: Saved, kernels: Kernels) -> None:
    model = load_folder(saved(name, torch.float32)[1], kernels)
    ids, counts = prompt_ids(), (20, 9, 30)
    expected = PagedRun(model).logits(ids[:59], counts)
    run, start = PagedRun(model), 0
    run.use_buffers(planned_buffers(model))
    for count in counts:
        found = run.chunk(ids, start, count, (count - 1, 0, 0), last_alone=True)
        start += count
        torch.testing.assert_close(found[0], expected[start - 1], rtol=1e-5, atol=1e-5)
