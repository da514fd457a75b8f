"""Bytes of a token stream to text, a part at a time. Owns what happens to invalid and unfinished UTF-8.

Bytes that can never become a character are replaced by U+FFFD: one for each byte in SentencePiece-style vocabularies, one for
each maximal part in byte-level ones, as the `tokenizers` library does for the usual case of a character cut off at the end.
(That library replaces a whole run of byte pieces if any of it is invalid, which no stream can do; here what is valid stays.)
"""

from __future__ import annotations

import codecs
import re

_ESCAPED = re.compile("[\udc80-\udcff]")


def decode_ready(data: bytes, *, each_byte: bool, final: bool) -> tuple[str, int]:
    """The text of `data` and how many bytes it took; an unfinished character at the end waits unless `final`.

    Worked example: b"a\\xf0\\x9f" gives ("a", 1); final, each byte on its own: ("a\\ufffd\\ufffd", 3).
    """
    text, used = codecs.utf_8_decode(data, "surrogateescape" if each_byte else "replace", final)
    if each_byte and not text.isascii():
        text = _ESCAPED.sub("\ufffd", text)
    return text, used
