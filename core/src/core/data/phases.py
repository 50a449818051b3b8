"""Sources that take turns, each as often as its weight says.

They do in a pattern of 1,000 rows, which repeats: so any 1,000 rows one after another hold the sources in exactly their
proportions. Where a source ends, or weights change, a phase begins, with a pattern of its own.
"""

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import numpy as np

PERIOD = 1000


class Phase(NamedTuple):
    """A stretch of rows in which the same sources take turns."""

    first: int
    """The row that it begins with."""
    pattern: np.ndarray
    """The source of each of PERIOD rows, (PERIOD,)."""
    earlier: np.ndarray
    """How often the source of each of those rows has had a turn before it in the pattern, (PERIOD,)."""
    counts: np.ndarray
    """Turns of each source in the pattern, (sources,)."""
    bases: np.ndarray
    """Rows of each source before the phase, (sources,)."""

    def turns(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each row of the mixture in this phase, and the number that the row has in it."""
        blocks, places = np.divmod(numbers - self.first, PERIOD)
        sources = self.pattern[places]
        return sources, self.bases[sources] + blocks * self.counts[sources] + self.earlier[places]


def shares(weights: Sequence[float]) -> np.ndarray:
    """How many of PERIOD rows each source has: whole numbers that are nearest to its share, and PERIOD together."""
    exact = np.array(weights) / np.sum(weights) * PERIOD
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")[: PERIOD - counts.sum()]
    counts[largest] += 1
    return counts


def spread_evenly(counts: np.ndarray) -> np.ndarray:
    """The source of each of PERIOD rows, (PERIOD,), so that each has had its share after any number of them, but for
    one row: at each the source has a turn that is furthest behind."""
    pattern, had = np.empty(PERIOD, np.int64), np.zeros_like(counts)
    for place in range(PERIOD):
        pattern[place] = np.argmax(counts * (place + 1) - had * PERIOD)
        had[pattern[place]] += 1
    return pattern


def phases(
    changes: Sequence[tuple[int, Sequence[float]]], n_rows: Sequence[int | None]
) -> tuple[list[Phase], int | None]:
    """The phases of a mixture of sources with so many rows, and the rows of the whole; None where it does not end.

    `changes` are the weights from a row on, in ascending order, the first from row 0. Where no source that has a weight
    has rows left, the mixture ends.
    """
    found: list[Phase] = []
    first, bases = 0, np.zeros(len(n_rows), np.int64)
    limits = [inf if n is None else n for n in n_rows]
    while True:
        weights = [weights for row, weights in changes if row <= first][-1]
        active = [number for number, limit in enumerate(limits) if bases[number] < limit and weights[number] > 0]
        if not active:
            return found, first
        counts = np.zeros_like(bases)
        counts[active] = shares([weights[number] for number in active])
        pattern = spread_evenly(counts)
        turns = [np.flatnonzero(pattern == number) for number in range(len(weights))]
        earlier = np.empty_like(pattern)
        for places in turns:
            earlier[places] = np.arange(places.size)
        found.append(Phase(first, pattern, earlier, counts, bases.copy()))
        ends = [row - first for row, _ in changes if row > first][:1]
        for number in active:
            if n_rows[number] is not None and counts[number]:
                blocks, place = divmod(int(limits[number] - bases[number]) - 1, int(counts[number]))
                ends.append(blocks * PERIOD + int(turns[number][place]) + 1)
        if not ends:
            return found, None
        blocks, rest = divmod(min(ends), PERIOD)
        bases += blocks * counts + np.bincount(pattern[:rest], minlength=len(weights))
        first += min(ends)
