"""Token ids to text as they come. Owns holding back what is not yet a whole character, and the first space."""

from __future__ import annotations

from collections.abc import Iterable

from brim.text.tokenizer import Tokenizer
from brim.text.utf8_pieces import decode_ready


class IncrementalDetokenizer:
    """Feed ids, get the text they add. All deltas and `finish` joined equal `tokenizer.decode` of all ids.

    is_continuation: the ids continue a text (a completion of a prompt), so a leading space is part of it and stays.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, is_continuation: bool = False) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skipped_ids = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._each_byte = tokenizer.replaces_each_byte
        self._at_start = tokenizer.strips_leading_space and not is_continuation
        self._pending = b""

    def feed(self, token_id: int) -> str:
        """The text this token completes; empty for a skipped special token or a part of a character."""
        if token_id in self._skipped_ids:
            return ""
        data = self._token_bytes(token_id)
        if not self._pending:
            try:
                text = data.decode()
            except UnicodeDecodeError:
                pass
            else:
                return text if not self._at_start else self._without_first_space(text)
        return self._take(self._pending + data, final=False)

    def feed_all(self, token_ids: Iterable[int]) -> str:
        """The text these tokens complete."""
        return "".join([self.feed(token_id) for token_id in token_ids])

    def finish(self) -> str:
        """What was held back, as U+FFFD; nothing may be fed afterwards."""
        return self._take(self._pending, final=True)

    def _take(self, data: bytes, *, final: bool) -> str:
        text, used = decode_ready(data, each_byte=self._each_byte, final=final)
        self._pending = data[used:]
        return self._without_first_space(text) if self._at_start else text

    def _without_first_space(self, text: str) -> str:
        if not text:
            return text
        self._at_start = False
        return text[1:] if text[0] == " " else text
