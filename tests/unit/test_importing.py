from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from brim.importing import collector_at_rest

MANY = 5000  # objects, more than a collection waits for


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def is_among(wanted: object, found: list[object]) -> bool:
    return any(one is wanted for one in found)


def test_what_is_made_meanwhile_is_old_at_once() -> None:
    with collector_at_rest():
        assert not gc.isenabled()
        made = [[i] for i in range(MANY)]
    assert gc.isenabled()
    assert is_among(made[0], gc.get_objects(generation=2)) and not is_among(made[0], gc.get_objects(generation=0))


def test_a_cycle_made_meanwhile_is_still_given_back() -> None:
    class Node:
        other: Node | None = None

    with collector_at_rest():
        made = [Node() for _ in range(MANY)]
        made[0].other = made[0]
    seen = weakref.ref(made[0])
    del made
    assert seen() is not None
    gc.collect()
    assert seen() is None


def test_for_good_means_that_no_collection_looks_at_it() -> None:
    with collector_at_rest(for_good=True):
        with collector_at_rest():
            made = [[i] for i in range(MANY)]
        assert not gc.isenabled()
    assert gc.isenabled() and not is_among(made[0], gc.get_objects())


def test_what_is_frozen_stays_so_where_nothing_is_imported() -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    with collector_at_rest():
        pass
    assert gc.get_freeze_count() == frozen


def test_the_collector_stays_off_where_it_was_and_comes_back_after_an_error() -> None:
    with pytest.raises(KeyError), collector_at_rest():
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    with collector_at_rest():
        pass
    assert not gc.isenabled()
