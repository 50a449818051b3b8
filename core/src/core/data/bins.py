"""Best-fit packing of whole documents into rows (arXiv:2404.10830): none is cut that fits into one.

The longest first, a piece goes into the row that has the least room for it; documents that are longer than a row are
cut into whole rows and a rest. What is free at the end of a row is padding.
"""

from typing import NamedTuple

import numpy as np

from core.data.shards import TokenStream


class Bins(NamedTuple):
    """Which pieces lie in which row."""

    pieces: np.ndarray
    """Numbers of pieces, those of one row after another, each row's in their own order."""
    firsts: np.ndarray
    """The place in `pieces` where each row begins, and the end of the last, (rows + 1,)."""


def best_fit(lengths: np.ndarray, capacity: int) -> Bins:
    """Pieces of these lengths, each from 1 to `capacity`, in rows of that size: best fit, the longest first.

    Rows with equally much room are alike, so all pieces of one length and all rows of one room are dealt with at once;
    the work is in the number of lengths, not of pieces.
    """
    order = np.argsort(-lengths, kind="stable")
    descending = lengths[order]
    rows = np.empty(lengths.size, np.int64)
    with_room: dict[int, list[np.ndarray]] = {}
    occupied = np.zeros(capacity + 1, np.bool_)
    n_rows = place = 0
    sizes, counts = np.unique(descending, return_counts=True)
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = place + count
        while place < end:
            room = size + int(np.argmax(occupied[size:]))
            if not occupied[room]:  # none has: new rows
                room, new = capacity, -(-(end - place) // (capacity // size))
                found = np.arange(n_rows, n_rows + new)
                n_rows += new
            else:
                found = np.concatenate(with_room.pop(room))
                occupied[room] = False
            each = room // size  # what is left of the tightest row is tighter still
            full, rest = divmod(min(end - place, found.size * each), each)
            taken = np.repeat(found[: full + (rest > 0)], each)[: full * each + rest]
            rows[order[place : place + taken.size]] = taken
            place += taken.size
            for left, some in (
                (room - each * size, found[:full]),
                (room - rest * size, found[full : full + (rest > 0)]),
                (room, found[full + (rest > 0) :]),
            ):
                if left and some.size:
                    with_room.setdefault(left, []).append(some)
                    occupied[left] = True
    pieces = np.argsort(rows, kind="stable")
    return Bins(pieces, np.searchsorted(rows[pieces], np.arange(n_rows + 1)))


class PackedRows:
    """Rows of whole documents of a token stream, each of seq_len + 1 tokens and filled up with padding."""

    def __init__(self, tokens: TokenStream, seq_len: int) -> None:
        self._tokens, self._size = tokens, seq_len + 1
        starts = tokens.document_starts()
        lengths = np.diff(starts, append=tokens.extent.tokens)
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        more = -(-np.maximum(lengths - self._size, 0) // seq_len)  # pieces behind the first, which begin with its last
        documents = np.repeat(np.arange(starts.size), more + 1)
        number = np.arange(documents.size) - np.repeat(np.cumsum(more + 1) - (more + 1), more + 1)
        self._places = starts[documents] + number * seq_len
        self._lengths = np.minimum(lengths[documents] - number * seq_len, self._size)
        self._bins = best_fit(self._lengths, self._size)
        self.n_rows = self._bins.firsts.size - 1
        self.padding = 1 - int(self._lengths.sum()) / max(self.n_rows * self._size, 1)
        """The share of the rows that is padding."""
        of_pieces = np.append(self._lengths[self._bins.pieces], 0)
        in_rows = np.add.reduceat(of_pieces, self._bins.firsts)[: self.n_rows]
        self.filled = np.minimum(in_rows, seq_len)
        """Tokens of each row that are read and no padding, the last of seq_len + 1 being a label alone, (rows,)."""

    def windows(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of rows, where documents and padding begin (bool), and what is no padding (bool), each of shape
        (len(numbers), seq_len + 1)."""
        tokens = np.zeros((len(numbers), self._size), np.int64)
        opens, filled = np.zeros((2, *tokens.shape), np.bool_)
        for row, number in enumerate(numbers.tolist()):
            first, last = self._bins.firsts[number : number + 2]
            place = 0
            for piece in self._bins.pieces[first:last].tolist():
                end = place + int(self._lengths[piece])
                self._tokens.read(int(self._places[piece]), tokens[row, place:end])
                opens[row, place] = True
                place = end
            filled[row, :place] = True
            opens[row, place : place + 1] = True
        return tokens, opens, filled
