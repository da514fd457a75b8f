"""Whether a request can be served at all. Owns the checks made before it is queued, each with its arithmetic in the message."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from brim.engine.block_manager import BlockManager
from brim.engine.limits import EngineLimits
from brim.engine.sampling_params import SamplingParams
from brim.errors import InvalidParameter, PromptTooLong


def checked_prompt(ids: Sequence[int], vocab_size: int) -> NDArray[np.int64]:
    """The prompt [n] as int64, the one time that it is converted. Raises InvalidParameter."""
    try:
        prompt = np.array(ids, dtype=np.int64)
    except OverflowError as error:
        raise InvalidParameter(f"A token id is outside the vocabulary (0 to {vocab_size - 1}).", param="prompt") from error
    except (TypeError, ValueError) as error:
        raise InvalidParameter(f"The prompt must be a list of token ids: {error}.", param="prompt") from error
    if not len(prompt):
        raise InvalidParameter("The prompt is empty: it must have at least one token.", param="prompt")
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        wrong = prompt[(prompt < 0) | (prompt >= vocab_size)][0]
        raise InvalidParameter(f"Token id {wrong} is outside the vocabulary (0 to {vocab_size - 1}).", param="prompt")
    return prompt


def most_tokens(num_prompt: int, params: SamplingParams, limits: EngineLimits, blocks: BlockManager, vocab_size: int) -> int:
    """The most tokens, prompt included, that the sequence may reach. Raises PromptTooLong or InvalidParameter.

    The last token is never computed, so a sequence of n tokens in all needs n - 1 positions in the cache. max_tokens None
    means: as many as context and cache hold.
    """
    for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
        wrong_ids = [token for token in ids if token >= vocab_size]
        if wrong_ids:
            raise InvalidParameter(f"{name} names token {wrong_ids[0]}; the vocabulary ends at {vocab_size - 1}.", param=name)
    if num_prompt >= limits.max_model_len:
        raise PromptTooLong(
            f"The prompt has {num_prompt} tokens; with at least one new token it passes the context length of "
            f"{limits.max_model_len}.",
            param="prompt",
            code="context_length_exceeded",
        )
    if not blocks.fits_alone(num_prompt):
        raise PromptTooLong(_block_arithmetic(num_prompt, 0, blocks), param="prompt", code="context_length_exceeded")
    if params.max_tokens is None:
        return _largest_total(num_prompt, limits.max_model_len, blocks)
    total = min(num_prompt + params.max_tokens, limits.max_model_len)
    if not blocks.fits_alone(total - 1):
        raise InvalidParameter(_block_arithmetic(num_prompt, total - 1 - num_prompt, blocks), param="max_tokens")
    return total


def _largest_total(low: int, high: int, blocks: BlockManager) -> int:
    """The largest total in low+1 .. high that fits in the cache; low positions do."""
    low += 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if blocks.fits_alone(middle - 1) else (low, middle - 1)
    return low


def _block_arithmetic(num_prompt: int, num_new: int, blocks: BlockManager) -> str:
    size = blocks.block_size
    new = f" + {num_new} new tokens" if num_new else ""
    parts = []
    for group, pool in zip(blocks.layout.groups, blocks.pools, strict=True):
        needed, usable = group.blocks_for(num_prompt + num_new, size, 1), pool.capacity - 1
        if needed > usable:
            parts.append(f"{needed} blocks of {size} tokens for {group.kind} attention, and the KV cache has {usable}")
    hint = "lower max_tokens" if num_new else "shorten the prompt"
    return f"The request ({num_prompt} prompt tokens{new}) needs {'; '.join(parts)}: {hint} or give the KV cache more memory."
