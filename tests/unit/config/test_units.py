"""Bytes as text and back."""

import pytest

from brim.errors import ConfigError
from brim.units import GIB, MIB, ceil_div, format_bytes, parse_bytes, round_up


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0),
        ("123", 123),
        ("1k", 1024),
        ("1KB", 1000),
        ("40GiB", 40 * GIB),
        (" 512 M ", 512 * MIB),
        ("1.5GiB", 1_610_612_736),
        ("1.5 gb", 1_500_000_000),
        ("2T", 2048 * GIB),
        ("0.1B", 0),
        ("1.000000000000000001GiB", GIB),
        ("9007199254740993.5", 9_007_199_254_740_993),
    ],
)
def test_sizes_are_read_exactly(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "1e9", "40 gibibytes", "1.", ".5G", "inf", "nan", "٣GiB", "9" * 5000, "1 2"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1_610_612_736, "1.50 GiB"),
        (-1_610_612_736, "-1.50 GiB"),
        (GIB - 1, "1.00 GiB"),
        (MIB - 1, "1.00 MiB"),
        (GIB - 6 * MIB, "1,018.00 MiB"),
        (5000 * GIB, "5,000.00 GiB"),
    ],
)
def test_bytes_are_printed_for_people(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_rounding_up() -> None:
    assert [ceil_div(n, 16) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert [round_up(n, 16) for n in (0, 1, 16, 17)] == [0, 16, 16, 32]
