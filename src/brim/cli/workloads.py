"""The workloads that are measured: which prompts, how many new tokens. Owns their definition; runs nothing.

Prompts are random token ids, so nothing is shared between them and every engine does the same work.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

MAX_TOKEN_ID = 10_000  # ids are drawn below it, or below the vocabulary where that is smaller
W_NUM_SEQS = 256
W_LENGTHS = (100, 1024)  # least and most, of prompts and of outputs
MIXED_16_LENGTHS = (38, 167, 231, 130, 215, 103, 73, 90, 194, 44, 209, 226, 132, 203, 115, 161)
MIXED_16_NEW_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests submitted all at once. prompts[i] asks for exactly num_new_tokens[i] tokens (end-of-sequence ignored)."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    num_new_tokens: tuple[int, ...]
    temperature: float

    @property
    def num_prompt_tokens(self) -> int:
        """Over all prompts."""
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        """Over all requests."""
        return sum(self.num_new_tokens)


def workload_w(vocab_size: int, num_seqs: int = W_NUM_SEQS) -> Workload:
    """Workload W: 256 prompts of 100-1024 random ids, then 256 output lengths of 100-1024, from seed 0, at temperature 0.6.

    A smaller num_seqs takes the first of these 256; a larger one draws more from the same seed.
    """
    draw = random.Random(0)
    low, high = W_LENGTHS
    largest_id = min(MAX_TOKEN_ID, vocab_size) - 1
    drawn = max(num_seqs, W_NUM_SEQS)
    prompts = [tuple(draw.randint(0, largest_id) for _ in range(draw.randint(low, high))) for _ in range(drawn)]
    lengths = [draw.randint(low, high) for _ in range(drawn)]
    return Workload("W", tuple(prompts[:num_seqs]), tuple(lengths[:num_seqs]), temperature=0.6)


def mixed_16(vocab_size: int) -> Workload:
    """16 prompts of 38-231 random ids (2,331 in all), 64 new tokens each, greedy: the small workload for CPUs."""
    draw = random.Random(0)
    prompts = tuple(random_prompt(draw, length, vocab_size) for length in MIXED_16_LENGTHS)
    return Workload("mixed-16", prompts, (MIXED_16_NEW_TOKENS,) * len(prompts), temperature=0.0)


def workload_named(name: str, vocab_size: int, num_seqs: int) -> Workload:
    """The requests of W (its first num_seqs) or of mixed-16, all of them."""
    return workload_w(vocab_size, num_seqs) if name == "W" else mixed_16(vocab_size)


def equal_prompts(batch_size: int, input_len: int, vocab_size: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """`batch_size` different prompts of input_len random ids."""
    draw = random.Random(seed)
    return tuple(random_prompt(draw, input_len, vocab_size) for _ in range(batch_size))


def random_prompt(draw: random.Random, length: int, vocab_size: int) -> tuple[int, ...]:
    """`length` random ids below 10,000 (or the vocabulary's size)."""
    largest_id = min(MAX_TOKEN_ID, vocab_size) - 1
    return tuple(draw.randint(0, largest_id) for _ in range(length))
