"""The error tree and what its members carry."""

import re

import pytest

import brim.errors
from brim.errors import BrimError, InvalidParameter, MemoryBudgetError


def test_the_tree_drawn_at_the_top_is_the_tree() -> None:
    drawn = re.findall(r"\+- (\w+)", brim.errors.__doc__ or "")
    real = [name for name, kind in vars(brim.errors).items() if isinstance(kind, type) and issubclass(kind, BrimError)]
    assert sorted([*drawn, "BrimError"]) == sorted(real)


def test_each_error_has_its_one_line_meaning() -> None:
    for name, kind in vars(brim.errors).items():
        if isinstance(kind, type) and issubclass(kind, BrimError):
            assert kind.__doc__, name


@pytest.mark.parametrize(
    ("nearest", "text"),
    [
        ((), "It does not fit."),
        (("--max-model-len 512",), "It does not fit. Settings that would fit: --max-model-len 512."),
        (("--a 1", "--b 2"), "It does not fit. Settings that would fit: --a 1; or --b 2."),
    ],
)
def test_a_budget_error_names_the_nearest_settings(nearest: tuple[str, ...], text: str) -> None:
    assert str(MemoryBudgetError("It does not fit.", nearest=nearest)) == text


def test_a_request_error_names_its_field() -> None:
    error = InvalidParameter("n must be 1.", param="n", code="bad_n")
    assert (str(error), error.param, error.code) == ("n must be 1.", "n", "bad_n")
