"""How the rows of attention are cut into tiles: some queries, and only the keys that they may see.

Letters: B rows, L length, T queries of a tile, S keys of a tile.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core.nn.kernel import Positions

TILE = 96
"""Queries of a tile. Measured, as are the next two: fewer cost calls, more compute what is hidden."""
WIDEST_TILE = 512
WORTH_CUTTING = range(192, 1024)
"""Lengths of causal documents without a window that are faster in tiles than in one call."""


class Tile(NamedTuple):
    """Queries start to end (without it), and keys from `first` to the same end."""

    start: int
    end: int
    first: int
    hidden_TS: Tensor | None
    """What is added to the logits: minus infinity where a query does not see a key. None: keys ahead are hidden."""


def row_tiles(starts: Sequence[int], length: int, window: int | None) -> Iterator[Tile]:
    """The tiles of a row of `length` whose documents start at `starts`; every query is in one of them."""
    ends = [*starts[1:], length]
    i = 0
    while i < len(starts):
        n = i + 1  # short documents share a tile
        while n < len(starts) and ends[n] - starts[i] <= TILE:
            n += 1
        if n > i + 1:
            begin, end = starts[i], ends[n - 1]
            lengths = [b - a for a, b in zip(starts[i:n], ends[i:n], strict=True)]
            document_T = torch.arange(n - i).repeat_interleave(torch.tensor(lengths))
            apart_TT = document_T[:, None] != document_T
            yield Tile(begin, end, begin, hidden(end - begin, 0, window).masked_fill(apart_TT, -torch.inf))
        else:
            yield from tiles_of_document(starts[i], ends[i], window)
        i = n


def tiles_of_document(begin: int, end: int, window: int | None) -> Iterator[Tile]:
    """The tiles of one document."""
    length = end - begin
    if window is None or window >= length:
        if length not in WORTH_CUTTING:
            yield Tile(begin, end, begin, None)
            return
        window = None
    size = TILE if window is None else min(max(window // 4, TILE), WIDEST_TILE)
    for start in range(begin, end, size):
        stop = min(start + size, end)
        first = begin if window is None else max(begin, start - window + 1)
        yield Tile(start, stop, first, hidden(stop - start, start - first, window))


@lru_cache(maxsize=256)
def hidden(n: int, n_before: int, window: int | None) -> Tensor:
    """What hides keys from `n` queries of which the first has `n_before` keys before it: (n, n_before + n)."""
    back_TS = torch.arange(n_before, n_before + n)[:, None] - torch.arange(n_before + n)
    seen_TS = back_TS >= 0 if window is None else (back_TS >= 0) & (back_TS < window)
    return torch.zeros(back_TS.shape).masked_fill_(~seen_TS, -torch.inf)


def rows_of(start_BL: Tensor | None, n_rows: int, length: int, window: int | None) -> Iterator[tuple[slice, Tile]]:
    """All tiles, each with the rows that it stands for."""
    if start_BL is None:
        yield from ((slice(0, n_rows), tile) for tile in row_tiles([0], length, window))
        return
    for b, start_L in enumerate(start_BL):
        rows = slice(b, b + 1) if len(start_BL) > 1 else slice(0, n_rows)
        yield from ((rows, tile) for tile in row_tiles(start_L.unique_consecutive().tolist(), length, window))


def starts(positions: Positions) -> Tensor:
    """Where the document of each token starts in its row, (B or 1, L); at 0 where rows are single documents."""
    document_BL, device = positions.document_BL, positions.position_BL.device
    if document_BL is None:
        return torch.zeros(1, positions.position_BL.shape[1], dtype=torch.int64, device=device)
    return (opens(document_BL) * torch.arange(document_BL.shape[1], device=device)).cummax(1).values


def opens(document_BL: Tensor) -> Tensor:
    """Whether a token is the first of its document in its row, (B, L)."""
    return F.pad(document_BL[:, 1:] != document_BL[:, :-1], (1, 0), value=True)


def spans(document_BL: Tensor) -> tuple[Tensor, int, int]:
    """Where documents start in the rows laid end to end, (S,) int32, the longest's length, and how many rows there
    are. The device is waited for."""
    starts_S = opens(document_BL).flatten().nonzero().flatten()
    longest = starts_S.diff(append=starts_S.new_tensor([document_BL.numel()])).max()
    return starts_S.int(), int(longest), len(document_BL)
