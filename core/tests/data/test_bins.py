"""Best-fit packing of whole documents, compared with one document at a time."""

import random

import numpy as np
import pytest
import torch

from core.data.bins import PackedRows, best_fit
from core.data.packing import IGNORE, PADDING, pack_rows
from core.data.shards import TokenStream


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """What is left in each row, where each length, the longest first, goes where the least is left."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in left if room >= length]
        left.remove(min(fitting)) if fitting else None
        left.append((min(fitting) if fitting else capacity) - length)
    return sorted(left)


@pytest.mark.parametrize("capacity", [1, 7, 16, 33])
def test_rows_are_those_of_best_fit(capacity: int) -> None:
    draw = random.Random(capacity)
    for n in (1, 2, 30, 400):
        for skew in (1.0, 3.0):
            lengths = [1 + int((capacity - 1) * draw.random() ** skew) for _ in range(n)]
            bins = best_fit(np.array(lengths), capacity)
            assert sorted(bins.pieces.tolist()) == list(range(n)) and bins.firsts[-1] == n
            rows = [bins.pieces[first:last] for first, last in zip(bins.firsts, bins.firsts[1:], strict=False)]
            assert all(row.tolist() == sorted(row.tolist()) for row in rows)
            assert sorted(capacity - sum(lengths[i] for i in row) for row in rows) == plain_best_fit(lengths, capacity)


def test_nothing_is_no_row() -> None:
    assert best_fit(np.empty(0, np.int64), 4).firsts.tolist() == [0]


def test_every_token_is_a_label_once_and_padding_never() -> None:
    draw, seq_len = random.Random(0), 9
    documents = [
        [100 * number + place for place in range(draw.choice([1, 2, 5, 9, 10, 11, 30]))] for number in range(60)
    ]
    stream = TokenStream.hold(documents, [True] * 60, 0, vocab_size=10_000)
    packed = PackedRows(stream, seq_len)
    batch = pack_rows(*packed.windows(np.arange(packed.n_rows)))
    labels = batch.labels_BL[batch.labels_BL != IGNORE].tolist()
    assert sorted(labels) == sorted(token for document in documents for token in document[1:])
    n_free = packed.n_rows * (seq_len + 1) - sum(map(len, documents))
    pieces = sum(1 + -(-max(len(document) - 10, 0) // seq_len) for document in documents)
    n_free -= pieces - 60  # tokens that begin a piece stand twice
    assert packed.padding == pytest.approx(n_free / (packed.n_rows * (seq_len + 1)))
    is_padding = batch.documents_BL == PADDING
    assert packed.filled.tolist() == (~is_padding).sum(1).tolist() and not batch.tokens_BL[is_padding].any()
    last_alone = sum(int(last) for last in packed.windows(np.arange(packed.n_rows))[2][:, -1])
    assert int((~is_padding).sum()) == packed.n_rows * (seq_len + 1) - n_free - last_alone
    for tokens, numbers, places in zip(batch.tokens_BL, batch.documents_BL, batch.positions_BL, strict=True):
        for number in range(int(numbers.max()) + 1):
            own = tokens[numbers == number]
            assert torch.equal(places[numbers == number], torch.arange(own.numel()))
            assert torch.equal(own, own[0] + torch.arange(own.numel()))  # of one document
