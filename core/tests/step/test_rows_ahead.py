"""Rows that are read ahead: those that a step would read by itself, in any order of steps."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from core.data.packing import Batch
from core.step import rows_ahead
from core.step.rows_ahead import RowsAhead


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, bool]]]:
    """The first rows that were read, and whether by the thread that asks."""
    seen: list[tuple[int, bool]] = []

    def microbatches(loader: Any, layout: Any, *, first: int, **_: Any) -> list[Batch]:
        seen.append((first, threading.current_thread() is threading.main_thread()))
        if first == 40:
            raise IndexError("the run ends before")
        return [Batch(*torch.full((4, 1, 2), first).unbind())]

    monkeypatch.setattr(rows_ahead, "microbatches", microbatches)
    yield seen


def rows(last_step: int, *, in_order: bool = False) -> RowsAhead:
    loader: Any = SimpleNamespace(in_order=in_order, source_names=())
    layout: Any = None
    sizes = {"n_rows": 10, "local_batch_size": 5}
    return RowsAhead(loader, layout, lambda step: 10 * (step - 1), last_step=last_step, **sizes)


def first(batches: list[Batch]) -> int:
    return int(batches[0].tokens_BL[0, 0])


def test_the_next_step_is_read_ahead_and_no_step_behind_the_last(read: list[tuple[int, bool]]) -> None:
    ahead = rows(3)
    assert [first(ahead(step)) for step in (1, 2, 3)] == [0, 10, 20]
    ahead.close()
    assert read == [(0, True), (10, False), (20, False)]
    assert ahead.take_wait_s() > 0 and ahead.take_wait_s() == 0


def test_another_step_than_the_next_is_read_when_it_is_asked_for(read: list[tuple[int, bool]]) -> None:
    ahead = rows(9)
    assert [first(ahead(step)) for step in (1, 4, 2)] == [0, 30, 10] and first(ahead.read(7)) == 60
    ahead.close()
    assert (30, True) in read and (10, True) in read


def test_what_goes_wrong_is_raised_by_the_step_that_it_is_of(read: list[tuple[int, bool]]) -> None:
    ahead = rows(9)
    ahead(4)
    with pytest.raises(IndexError, match="the run ends before"):
        ahead(5)
    ahead.close()


def test_rows_with_a_place_are_never_ahead_of_it(read: list[tuple[int, bool]]) -> None:
    ahead = rows(9, in_order=True)
    assert [first(ahead(step)) for step in (1, 2)] == [0, 10]
    ahead.close()
    assert read == [(0, True), (10, True)]
