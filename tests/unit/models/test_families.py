"""Every family against `transformers` on small random models, however the prompt is cut and wherever its blocks lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

from brim.kernels.base import Kernels

from .conftest import Saved
from .helpers import CONFIGS, VOCAB, PagedRun, chunkings, hf_logits, load_folder, prompt_ids

MOST_DIFFERENCE = 2e-5  # ten times what is measured


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_logits_are_those_of_transformers(name: str, saved: Saved, kernels: Kernels) -> None:
    oracle, folder = saved(name, torch.float32)
    ids = prompt_ids(44)
    expected = hf_logits(oracle, ids)
    assert expected.std() > 0.3, "logits too flat to show mistakes"
    model = load_folder(folder, kernels)
    results = {
        cut: PagedRun(model, block_order_seed=seed).logits(ids, chunks)
        for seed, (cut, chunks) in enumerate(chunkings(len(ids)).items())
    }
    worst = max((result - expected).abs().max().item() for result in results.values())
    print(f"{name} {kernels.name}: {worst:.2e}")
    assert worst <= MOST_DIFFERENCE, f"{name} differs by {worst:.2e}"
    if kernels.name == "cpu":
        assert all(torch.equal(result, results["whole"]) for result in results.values()), "the cut changed the result"


HALF = [(name, torch.bfloat16) for name in ("llama-rope3-bias-tied", "mistral-window", "qwen2", "qwen3", "gemma3")]


@pytest.mark.parametrize(("name", "dtype"), [*HALF, ("llama", torch.float16)])
def test_half_precision_is_as_close_as_transformers(name: str, dtype: torch.dtype, saved: Saved, kernels: Kernels) -> None:
    ids = prompt_ids()
    exact = hf_logits(saved(name, torch.float32)[0], ids)
    oracle, folder = saved(name, dtype)
    theirs = (hf_logits(oracle, ids) - exact).abs()
    ours = (PagedRun(load_folder(folder, kernels, dtype)).logits(ids, [60]) - exact).abs()
    step = torch.finfo(dtype).eps * exact.abs().max().item()
    assert ours.mean() <= 1.5 * theirs.mean() + 0.05 * step
    assert ours.max() <= 1.5 * theirs.max() + step


def test_blocks_may_hold_anything_before(saved: Saved, kernels: Kernels) -> None:
    """What another sequence, or a window that moved on, left in a block is never read."""
    _, folder = saved("gemma3", torch.float32)
    ids = prompt_ids()
    run = PagedRun(load_folder(folder, kernels))
    first = run.logits(ids, [60])
    run.logits(ids.flip(0), [30, 30])
    assert torch.equal(run.logits(ids, [60]), first)


def test_text_part_of_a_multimodal_gemma3(kernels: Kernels, tmp_path: Path) -> None:
    """The wrapper's config nests the text's, its tensors carry a prefix, and the vision tower is left aside."""
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = CONFIGS["gemma3"]()
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=VOCAB - 1)
    torch.manual_seed(1)
    oracle = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    oracle.save_pretrained(tmp_path)
    ids = prompt_ids() % (VOCAB - 1)
    model = load_folder(tmp_path, kernels)
    assert (PagedRun(model).logits(ids, [60]) - hf_logits(oracle, ids)).abs().max() <= MOST_DIFFERENCE
