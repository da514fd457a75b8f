"""The workloads are the published ones."""

import random

import pytest

from brim.cli.workloads import MIXED_16_LENGTHS, equal_prompts, mixed_16, workload_w


def test_workload_w_is_drawn_as_it_is_defined() -> None:
    state = random.getstate()
    random.seed(0)
    prompts = [[random.randint(0, 9999) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    lengths = [random.randint(100, 1024) for _ in range(256)]
    random.setstate(state)
    workload = workload_w(vocab_size=151_936)
    assert [list(prompt) for prompt in workload.prompts] == prompts
    assert list(workload.num_new_tokens) == lengths
    assert workload.temperature == 0.6


def test_a_smaller_w_is_its_beginning_and_a_larger_one_draws_more() -> None:
    whole, part, more = workload_w(9999), workload_w(9999, 3), workload_w(9999, 300)
    assert (part.prompts, part.num_new_tokens) == (whole.prompts[:3], whole.num_new_tokens[:3])
    assert len(more.prompts) == len(more.num_new_tokens) == 300


def test_ids_stay_below_a_small_vocabulary() -> None:
    assert max(max(prompt) for prompt in workload_w(50, 20).prompts) == 49
    assert max(max(prompt) for prompt in equal_prompts(4, 100, 50)) <= 49


def test_mixed_16() -> None:
    workload = mixed_16(262_144)
    assert [len(prompt) for prompt in workload.prompts] == list(MIXED_16_LENGTHS)
    assert (min(MIXED_16_LENGTHS), max(MIXED_16_LENGTHS), workload.num_prompt_tokens) == (38, 231, 2331)
    assert workload.num_output_tokens == 16 * 64


@pytest.mark.parametrize(("batch_size", "input_len"), [(1, 1), (8, 128)])
def test_equal_prompts_differ_and_repeat(batch_size: int, input_len: int) -> None:
    prompts = equal_prompts(batch_size, input_len, 10_000)
    assert [len(prompt) for prompt in prompts] == [input_len] * batch_size
    assert len(set(prompts)) == batch_size
    assert prompts == equal_prompts(batch_size, input_len, 10_000)
