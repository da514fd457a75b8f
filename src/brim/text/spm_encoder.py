"""Byte-pair encoding in the manner of SentencePiece, over a vocabulary without a merge list. Owns text -> ids only.

Any two neighbours whose concatenation is a piece may merge; the best-ranked piece merges first. Equal to the `tokenizers`
library's BPE with the merge list `transformers` derives from such a vocabulary (half a million merges for Gemma 3: ten seconds
to derive, 290 MiB and over a second to load), at the cost of nothing but a dictionary of the pieces:

- rank is the piece's id where `scores` is None (Gemma), else its score, highest first;
- between merges of equal rank the longer left part wins, then the longer right part, then the lower id, then the leftmost.

SentencePiece itself merges user-defined pieces before all others and knows no preference by part length; `transformers` is
followed here, so results can differ from SentencePiece's on such ties.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from heapq import heapify, heappop, heappush
from itertools import pairwise

import numpy as np
import numpy.typing as npt

SPACE = "▁"
_UNKNOWN = "\udc00"  # stands for an unknown character while merging: no piece can contain a lone surrogate
_NEVER = 1 << 200
_SHORT = 40  # below this many symbols scanning all ranks beats a heap
_LENGTH_BITS = 12
_LENGTH_MASK = (1 << _LENGTH_BITS) - 1
_POSITION_BITS = 40
_CACHED_WORDS = 1 << 15
_CACHED_LENGTH = 32


class SpmEncoder:
    """Encodes text in which spaces are already written as ▁. Thread-safe: the only state is a cache of words."""

    def __init__(self, ids: Mapping[str, int], scores: npt.NDArray[np.float32] | None, unknown_id: int) -> None:
        """ids: piece -> id. scores: by id, or None where the id is the rank. unknown_id: for what has no piece and no bytes."""
        self._ids = ids
        self._unknown_id = unknown_id
        self._ranks = None if scores is None else _dense_ranks(scores)
        self._bytes = [f"<0x{byte:02X}>" for byte in range(256)]
        self._has_bytes = all(piece in ids for piece in self._bytes)
        self._words = _word_pattern(ids)
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; never fails."""
        cache = self._cache
        if len(cache) > _CACHED_WORDS:
            cache = self._cache = {}
        ids: list[int] = []
        for word in self._words.findall(text):
            known = cache.get(word)
            if known is None:
                known = self._encode_word(word)
                if len(word) <= _CACHED_LENGTH:
                    cache[word] = known
            ids += known
        return ids

    def _encode_word(self, word: str) -> list[int]:
        symbols = list(word)
        if not all(symbol in self._ids for symbol in symbols):
            symbols = self._with_fallback(symbols)
        if len(symbols) > 1:
            symbols = self._merge_short(symbols) if len(symbols) <= _SHORT else self._merge_long(symbols)
        get, unknown_id = self._ids.get, self._unknown_id
        return [get(symbol, unknown_id) for symbol in symbols]

    def _with_fallback(self, characters: list[str]) -> list[str]:
        """Characters without a piece become their bytes' pieces, or one unknown for each run of them."""
        symbols: list[str] = []
        for character in characters:
            if character in self._ids:
                symbols.append(character)
            elif self._has_bytes:
                symbols += [self._bytes[byte] for byte in character.encode()]
            elif not symbols or symbols[-1] != _UNKNOWN:
                symbols.append(_UNKNOWN)
        return symbols

    def _rank(self, left: str, right: str) -> int:
        """Smaller merges first; _NEVER where the two make no piece."""
        token_id = self._ids.get(left + right)
        if token_id is None:
            return _NEVER
        if self._ranks is None:
            return token_id << _LENGTH_BITS | _LENGTH_MASK - len(left)
        by_lengths = (_LENGTH_MASK - len(left)) << _LENGTH_BITS | _LENGTH_MASK - len(right)
        return (self._ranks[token_id] << 2 * _LENGTH_BITS | by_lengths) << 24 | token_id

    def _merge_short(self, symbols: list[str]) -> list[str]:
        rank = self._rank
        ranks = [rank(left, right) for left, right in pairwise(symbols)]
        while ranks:
            best = min(ranks)
            if best == _NEVER:
                break
            at = ranks.index(best)
            symbols[at] += symbols.pop(at + 1)
            del ranks[at]
            if at:
                ranks[at - 1] = rank(symbols[at - 1], symbols[at])
            if at < len(ranks):
                ranks[at] = rank(symbols[at], symbols[at + 1])
        return symbols

    def _merge_long(self, symbols: list[str]) -> list[str]:
        """The same result in n log n: a heap of rank and position, neighbours linked, a merged-away symbol left empty."""
        rank, count = self._rank, len(symbols)
        after = [*range(1, count), -1]
        before = list(range(-1, count - 1))
        heap = [
            merge << _POSITION_BITS | at for at in range(count - 1) if (merge := rank(symbols[at], symbols[at + 1])) != _NEVER
        ]
        heapify(heap)
        position_mask = (1 << _POSITION_BITS) - 1
        while heap:
            entry = heappop(heap)
            at = entry & position_mask
            right = after[at]
            if right < 0 or not symbols[at] or rank(symbols[at], symbols[right]) != entry >> _POSITION_BITS:
                continue
            symbols[at] += symbols[right]
            symbols[right] = ""
            beyond = after[at] = after[right]
            if beyond >= 0:
                before[beyond] = at
                if (merge := rank(symbols[at], symbols[beyond])) != _NEVER:
                    heappush(heap, merge << _POSITION_BITS | at)
            left = before[at]
            if left >= 0 and (merge := rank(symbols[left], symbols[at])) != _NEVER:
                heappush(heap, merge << _POSITION_BITS | left)
        return [symbol for symbol in symbols if symbol]


def _dense_ranks(scores: npt.NDArray[np.float32]) -> list[int]:
    """0 for the highest score; equal scores rank equal. NaN ranks last."""
    _, ranks = np.unique(-scores, return_inverse=True)
    result: list[int] = ranks.tolist()
    return result


def _word_pattern(pieces: Mapping[str, int]) -> re.Pattern[str]:
    """Splits text before each run of ▁ where that changes nothing: no piece has the character before ▁ and ▁ after it.

    Worked example: with the pieces "a", "▁b", "ab▁", text "ca▁b▁c" is split to "ca", "▁b▁c": "b▁" occurs in a piece.
    """
    crossing = set(re.findall("([^▁\n])▁", "\n".join(pieces)))
    if any("\n▁" in piece for piece in pieces):  # the separator above hides these
        crossing.add("\n")
    if not crossing:
        return re.compile("▁*[^▁]+|▁+")
    joined = "".join(map(re.escape, sorted(crossing)))
    return re.compile(f"▁*(?:[^▁{joined}]|[{joined}]▁*)+|▁+")
