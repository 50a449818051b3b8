import numpy as np
import torch

from core.data.packing import IGNORE, pack_rows


def packed_by_loop(windows, starts):
    """The definition, token by token."""
    rows = []
    for window, opens in zip(windows.tolist(), starts.tolist(), strict=True):
        labels, positions, documents = [], [], []
        position = document = 0
        for t in range(len(window) - 1):
            if t > 0 and opens[t]:
                position, document = 0, document + 1
            labels.append(IGNORE if opens[t + 1] else window[t + 1])
            positions.append(position)
            documents.append(document)
            position += 1
        rows.append((window[:-1], labels, positions, documents))
    return [torch.tensor([row[i] for row in rows]) for i in range(4)]


def test_pack_equals_the_plain_loop():
    random = np.random.default_rng(0)
    for length in (1, 2, 5, 64):
        for density in (0.0, 0.05, 0.5, 1.0):
            windows = random.integers(0, 2**17, (9, length + 1))
            starts = random.random(windows.shape) < density
            for found, expected in zip(pack_rows(windows, starts)[:4], packed_by_loop(windows, starts), strict=True):
                assert found.dtype == torch.int64
                assert torch.equal(found, expected)


def test_pack_as_in_the_picture():
    a, b, c, d, e, f = range(6)
    batch = pack_rows(np.array([[a, b, c, d, e, f]], dtype=np.uint16), np.array([[1, 0, 1, 0, 0, 1]], dtype=bool))
    assert batch.labels_BL.tolist() == [[b, IGNORE, d, e, IGNORE]]
    assert batch.positions_BL.tolist() == [[0, 1, 0, 1, 2]]
    assert batch.documents_BL.tolist() == [[0, 0, 1, 1, 1]]


def test_pack_leaves_its_input_as_it_was():
    windows, starts = np.arange(6).reshape(1, 6), np.ones((1, 6), dtype=bool)
    batch = pack_rows(windows, starts)
    batch.tokens_BL.zero_()
    assert windows.tolist() == [[0, 1, 2, 3, 4, 5]] and starts.all()
