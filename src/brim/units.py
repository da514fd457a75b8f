"""Bytes parsed and printed. Owns the two directions between text and integer bytes; a ratio never leaves this file
except as a `Fraction`-free pair (see `config.schema.MemoryRequest`)."""

from __future__ import annotations

import re

from brim.errors import ConfigError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_SUFFIX_BYTES = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 1000,
    "m": MIB, "mib": MIB, "mb": 1000**2,
    "g": GIB, "gib": GIB, "gb": 1000**3,
    "t": 1 << 40, "tib": 1 << 40, "tb": 1000**4,
}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]{1,20})(?:\.([0-9]{1,20}))?\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str) -> int:
    """Bytes of `'40GiB'`, `'512M'`, `'1.5 GB'` or a plain integer. Bare K, M, G, T are binary, as in Kubernetes' Ki.

    Exact in integers, a fraction of a byte is dropped. Raises ConfigError for anything else.
    Example: parse_bytes("1.5GiB") == 1_610_612_736.
    """
    match = _SIZE.fullmatch(text)
    factor = _SUFFIX_BYTES.get(match.group(3).lower()) if match else None
    if match is None or factor is None:
        raise ConfigError(f"'{text}' is not a size; write for example 40GiB, 512MiB or a number of bytes.")
    decimals = match.group(2) or ""
    return int(int(match.group(1) + decimals) * factor // 10 ** len(decimals))


def format_bytes(num_bytes: int) -> str:
    """Short text for people: `format_bytes(1_610_612_736) == '1.50 GiB'`; keeps the sign.

    The unit is the largest that gives at least 1.00 after rounding: one byte less than 1 GiB is 1.00 GiB, not 1,024.00 MiB.
    """
    size = abs(num_bytes)
    for unit_bytes, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit_bytes - unit_bytes // 2048:
            return f"{num_bytes / unit_bytes:,.2f} {name}"
    return f"{num_bytes} B"


def ceil_div(numerator: int, denominator: int) -> int:
    """Integer division rounded up: ceil_div(17, 16) == 2."""
    return -(-numerator // denominator)


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is >= value."""
    return ceil_div(value, multiple) * multiple
