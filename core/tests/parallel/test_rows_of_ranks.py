"""A step has the same rows on any number of ranks; rows behind the last one are there and count for nothing."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from core.data.packing import IGNORE, Batch
from core.step.rows import microbatches, open_samples, padded


class Rows:
    """A text whose row i has the token i alone, and no row from `n` on. A stream must be read in order."""

    def __init__(self, n: int | None, *, stream: bool = False) -> None:
        self.n, self.in_order, self.read_so_far = n, stream, 0

    def read(self, first: int, count: int) -> Batch:
        assert self.n is None or 0 <= first and first + count <= self.n, "behind the last row"
        assert not self.in_order or first == self.read_so_far
        self.read_so_far += count
        row_BL = torch.arange(first, first + count)[:, None].expand(-1, 3)
        return Batch(*(row_BL.clone() for _ in range(4)))


def rank(rank_: int, n: int) -> Any:
    return SimpleNamespace(data_rank=rank_, degrees=SimpleNamespace(data=n))


def dealt(n_ranks: int, *, n: int = 100, **settings: Any) -> list[list[Batch]]:
    """The microbatches of every rank."""
    return [microbatches(Rows(n), rank(r, n_ranks), **settings) for r in range(n_ranks)]


def counted(batches: list[Batch]) -> list[int]:
    """The rows of which labels count."""
    rows = torch.cat([batch.labels_BL for batch in batches])
    assert ((rows == IGNORE).all(1) | (rows != IGNORE).all(1)).all()
    return [row for row in rows[:, 0].tolist() if row != IGNORE]


def test_rows_by_hand() -> None:
    first, second = dealt(2, first=8, n_rows=8, local_batch_size=2)
    assert [batch.tokens_BL[:, 0].tolist() for batch in first] == [[8, 9], [12, 13]]
    assert [batch.tokens_BL[:, 0].tolist() for batch in second] == [[10, 11], [14, 15]]


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("local_batch_size", [1, 2, 4])
def test_a_step_has_the_same_rows_on_any_number_of_ranks(n_ranks: int, local_batch_size: int) -> None:
    ranks = dealt(n_ranks, first=5, n_rows=48, local_batch_size=local_batch_size)
    in_turn = [row for batches in zip(*ranks, strict=True) for row in counted(list(batches))]
    assert in_turn == list(range(5, 53))
    assert {batch.tokens_BL.shape for batches in ranks for batch in batches} == {(local_batch_size, 3)}


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
@pytest.mark.parametrize("end", [17, 18, 21, 23, 24])
def test_rows_behind_the_last_one_count_for_nothing(n_ranks: int, end: int) -> None:
    ranks = dealt(n_ranks, n=end, first=16, n_rows=8, local_batch_size=2, end=end)
    assert sorted(row for batches in ranks for row in counted(batches)) == list(range(16, end))
    assert {len(batches) for batches in ranks} == {4 // n_ranks}
    for batch in (batch for batches in ranks for batch in batches):
        assert all(part.shape == (2, 3) for part in batch[:4])
        assert ((batch.tokens_BL >= 16) & (batch.tokens_BL < end)).all(), "a row that is not there was made up"


def test_padding_changes_nothing_that_is_shared() -> None:
    batch = Rows(9).read(3, 3)
    assert padded(batch, 3, 3) is batch
    more = padded(batch, 2, 4)
    assert more.tokens_BL[:, 0].tolist() == [3, 4, 4, 4] and more.labels_BL[:, 0].tolist() == [3, 4, IGNORE, IGNORE]
    assert batch.labels_BL[:, 0].tolist() == [3, 4, 5]
    assert (padded(batch, 0, 2).labels_BL == IGNORE).all()


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_of_a_stream_each_rank_reads_its_own_in_order(n_ranks: int) -> None:
    """Ranks read different documents, so all begin at 0 and go on where they were."""
    for r in range(n_ranks):
        loader = Rows(None, stream=True)
        for step in range(3):
            batches = microbatches(loader, rank(r, n_ranks), first=step * 16, n_rows=16, local_batch_size=2)
            assert len(batches) == 8 // n_ranks
        assert loader.read_so_far == 48 // n_ranks


@pytest.mark.parametrize(("number", "local", "verifies"), [(0, 0, True), (1, 1, False), (2, 0, True), (3, 1, False)])
def test_the_first_rank_of_every_machine_verifies_the_text(monkeypatch, number, local, verifies) -> None:
    places = {"RANK": number, "WORLD_SIZE": 4, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": 2}
    for name, value in places.items():
        monkeypatch.setenv(name, str(value))
    config: Any = SimpleNamespace(build=lambda **live: live)
    opened: Any = open_samples(config, None, rank(number, 4), "train", seq_len=8, seed=0, rows_per_step=4)
    assert opened["verify"] is verifies and (opened["rank"], opened["n_ranks"]) == (number, 4)
