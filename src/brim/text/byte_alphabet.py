"""The printable alphabet in which byte-level vocabularies spell bytes. Owns the mapping both ways.

Printable Latin-1 characters stand for themselves; the other 68 bytes are U+0100 onwards in byte order (GPT-2's convention):
a space is spelled Ġ, a newline Ċ.
"""

from __future__ import annotations


def byte_of_character() -> dict[str, int]:
    """Character -> byte, for all 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + number): byte for number, byte in enumerate(others)})
    return alphabet
