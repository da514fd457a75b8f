"""Where generated text must end. Owns the search for stop strings across deltas and what may not be shown yet."""

from __future__ import annotations

from collections.abc import Sequence

from brim.errors import InvalidParameter


class StopChecker:
    """Feed text deltas, get text that is safe to show; after a match `matched` names the stop string and no more text comes.

    Of several matches the one that ends first wins, as if the text were watched letter by letter, so the result does not
    depend on how the text was cut into deltas; of those that end together the longest wins. Held back is the longest end of
    the text that begins a stop string. Cost: amortised constant for each letter and stop string (Knuth-Morris-Pratt).
    """

    def __init__(self, stop: Sequence[str], include_stop_str_in_output: bool = False) -> None:
        """Raises InvalidParameter for an empty stop string."""
        if not all(stop):
            raise InvalidParameter("A stop string is empty; leave it out.", param="stop")
        self._watchers = [_Watcher(text) for text in sorted(set(stop), key=lambda text: (-len(text), text))]
        self._firsts = {text[0] for text in stop}
        self._include = include_stop_str_in_output
        self._held = ""
        self.matched: str | None = None

    def feed(self, delta: str) -> str:
        """The text that may be shown now. Empty after a match."""
        if self.matched is not None:
            return ""
        if not self._held and not any(first in delta for first in self._firsts):
            return delta
        text = self._held + delta
        for at in range(len(self._held), len(text)):
            for watcher in self._watchers:
                if watcher.sees(text[at]) and self.matched is None:
                    self.matched = watcher.text
            if self.matched is not None:
                self._held = ""
                return text[: at + 1 if self._include else at + 1 - len(self.matched)]
        shown = len(text) - max(watcher.length for watcher in self._watchers)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """What was held back and turned out not to be a stop string."""
        held, self._held = self._held, ""
        return held


class _Watcher:
    """How much of one stop string the text seen so far ends with."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = 0
        self._shorter = _borders(text)

    def sees(self, character: str) -> bool:
        """Take one more letter; whether the stop string is complete with it."""
        text, length = self.text, self.length
        while length and (length == len(text) or text[length] != character):
            length = self._shorter[length - 1]
        self.length = length + 1 if text[length] == character else 0
        return self.length == len(text)


def _borders(text: str) -> list[int]:
    """For each prefix the length of its longest proper end that begins `text`. Example: "aab" gives [0, 1, 0]."""
    borders = [0] * len(text)
    length = 0
    for at in range(1, len(text)):
        while length and text[at] != text[length]:
            length = borders[length - 1]
        length += text[at] == text[length]
        borders[at] = length
    return borders
