"""The sizes that steps are rounded up to. Owns the finite sets of token counts, row counts and captured batch sizes.

A matrix library chooses among many kernels by the number of rows and loads each when it is first used, which takes time and
device memory. Rounding every step up to one of a few sizes makes the set of shapes finite, so that all of them run before KV
is committed. Where products are the backend's own and need no loading, nothing is rounded.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from brim.memory.step_memory import StepLimits
from brim.platforms.profile import StartCosts
from brim.worker.graph_choice import GraphChoice

_MIXED = (8, 16, 32, 64, 128, 256, 384, 512)
_TOKEN_STEP = 64  # of steps beyond the captured ones: less than 12 % more rows at 513 tokens, 0.8 % at 8,000
_EXACT_SEQS = 64


@dataclass(frozen=True, slots=True)
class Sizes:
    """Increasing sizes; the last is the largest there is. Empty: every size is its own."""

    values: tuple[int, ...]

    def up(self, count: int) -> int:
        """The least size that holds count."""
        return self.values[bisect_left(self.values, count)] if self.values else count


@dataclass(frozen=True, slots=True)
class StepSizes:
    """tokens: of a step. rows: of logits at once. decode: sequences of captured decode steps. mixed: tokens of others."""

    tokens: Sizes
    rows: Sizes
    decode: tuple[int, ...]
    mixed: tuple[int, ...]


def rounded_sizes(limits: StepLimits, logit_rows: int) -> StepSizes:
    """For devices whose matrix library loads kernels as it goes."""
    mixed = _with_last(tuple(size for size in _MIXED if size <= limits.max_num_tokens), min(limits.max_num_tokens, _MIXED[-1]))
    decode = _with_last(tuple(size for size in _decode_steps() if size <= limits.max_num_seqs), min(limits.max_num_seqs, 512))
    steps = (*range(_MIXED[-1] + _TOKEN_STEP, limits.max_num_tokens, _TOKEN_STEP), limits.max_num_tokens)
    tokens = sorted({*mixed, *decode, *(size for size in steps if size <= limits.max_num_tokens)})
    rows = tuple(size for size in _decode_steps() if size <= logit_rows)
    decode = tuple(size for size in decode if size <= logit_rows)
    return StepSizes(Sizes(tuple(tokens)), Sizes(_with_last(rows, logit_rows)), decode, mixed)


def predicted_graph_bytes(choice: GraphChoice, sizes: StepSizes, num_layers: int, costs: StartCosts) -> int:
    """What captures take of the device, for plans."""
    whole = len(sizes.decode) * choice.decode_whole + len(sizes.mixed) * choice.mixed_whole
    pieces = len(sizes.mixed) * choice.pieces * (num_layers + 1)
    return costs.graph_bytes(whole, pieces, num_layers)


def exact_sizes(limits: StepLimits, logit_rows: int) -> StepSizes:
    """For backends whose recorded programs cost next to nothing: one a batch size, up to 64 sequences."""
    return StepSizes(Sizes(()), Sizes(()), tuple(range(1, min(limits.max_num_seqs, logit_rows, _EXACT_SEQS) + 1)), ())


def _decode_steps() -> tuple[int, ...]:
    """1, 2, 4, then every 8 to 256 and every 16 to 512: the sizes users know from vLLM."""
    return (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))


def _with_last(sizes: tuple[int, ...], last: int) -> tuple[int, ...]:
    return sizes if sizes and sizes[-1] >= last else (*sizes, last)
