"""Tokens that are found whole in the raw text before anything else. Owns the search, not what the tokens mean.

At each place the longest token wins, and the leftmost place first, as in the `tokenizers` library.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable


class AddedTokens:
    """Splits text at added tokens. A token is looked for only where its first character stands, longest first."""

    def __init__(self, ids: Iterable[tuple[str, int]]) -> None:
        self._ids = {piece: token_id for piece, token_id in ids if piece}
        lengths: dict[str, set[int]] = defaultdict(set)
        for piece in self._ids:
            lengths[piece[0]].add(len(piece))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._starts = re.compile("[" + "".join(map(re.escape, self._lengths)) + "]") if self._lengths else None

    def split(self, text: str) -> list[str | int]:
        """The text as parts in order: a str is ordinary text (never empty), an int an added token's id."""
        if self._starts is None:
            return [text] if text else []
        parts: list[str | int] = []
        get, search, lengths = self._ids.get, self._starts.search, self._lengths
        done = position = 0
        while (found := search(text, position)) is not None:
            start = found.start()
            for length in lengths[text[start]]:
                token_id = get(text[start : start + length])
                if token_id is not None:
                    break
            else:
                position = start + 1
                continue
            if start > done:
                parts.append(text[done:start])
            parts.append(token_id)
            done = position = start + length
        if done < len(text):
            parts.append(text[done:])
        return parts
