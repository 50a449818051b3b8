"""Rows of several sources in fixed proportions.

The sources take turns in a pattern of 1,000 rows, which repeats: so any 1,000 rows one after another hold them in
exactly their proportions, and which row of which source row i is, is arithmetic. Where a source ends, the others go on
in a pattern of their own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from math import inf
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from core.config.configurable import Configurable
from core.config.errors import UserError
from core.data.packing import Batch
from core.data.samples import MaskKind, Samples
from core.data.shards import json_digest

PERIOD = 1000


@dataclass(kw_only=True, slots=True)
class MixtureSource(Configurable.Config):
    """One source of a mixture."""

    data: Samples.Config
    """What is read, and how often: a source whose `epochs` are over has no more rows."""
    weight: float = 1.0
    """Its share of the rows, beside the weights of the others."""
    name: str = ""
    """What the record calls it; empty is its number."""


@dataclass(kw_only=True, slots=True)
class MixtureStage(Configurable.Config):
    """Other weights from a step on."""

    step: int
    """The first step with these weights."""
    weights: list[float] = field(default_factory=list)
    """One for each source; 0 leaves a source out."""


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


class Mixture(Samples):
    """Rows of several sources, of each as many as its weight says, in the order in which it has them itself.

    Its validation split is that of all sources which have one, one behind the other.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Samples.Config):
        sources: list[MixtureSource] = field(default_factory=list)
        """What is mixed, and in which proportions."""
        schedule: list[MixtureStage] = field(default_factory=list)
        """Weights that change in the course of the run."""

        def names(self) -> list[str]:
            """What the record calls the sources."""
            return [source.name or str(number) for number, source in enumerate(self.sources)]

        def held_out(self) -> Self:
            sources = [replace(source, data=source.data.held_out()) for source in self.sources]
            return replace(self, sources=sources, schedule=[])

        def problems(self) -> Iterator[tuple[str, str]]:
            """Mixtures of nothing, and sources that would have no row in 1,000."""
            if not self.sources:
                yield "sources", "a mixture has at least one source"
            names = self.names()
            if twice := [name for name in names if names.count(name) > 1]:
                yield "sources", f"two sources have the name {twice[0]}: the record could not tell them apart"
            weights = [source.weight for source in self.sources]
            wrong = [(i, weight) for i, weight in enumerate(weights) if not 0 < weight < inf]
            for number, weight in wrong:
                yield f"sources.{number}.weight", f"weight {weight} must be above 0, and finite: leave the source out"
            if self.sources and not wrong:
                for number, n in enumerate(shares(weights).tolist()):
                    if n == 0:
                        share = weights[number] / sum(weights)
                        yield f"sources.{number}.weight", f"a share of {share:.2g} is no row in {PERIOD:,}: raise it"
            yield from self._stage_problems()

        def _stage_problems(self) -> Iterator[tuple[str, str]]:
            before = 1
            for number, stage in enumerate(self.schedule):
                if stage.step <= before:
                    yield f"schedule.{number}.step", f"step {stage.step} must be later than step {before}"
                before = stage.step
                weights = stage.weights
                if len(weights) != len(self.sources):
                    yield f"schedule.{number}.weights", f"{len(weights)} weights for {len(self.sources)} sources"
                elif not all(0 <= weight < inf for weight in weights) or not any(weights):
                    yield f"schedule.{number}.weights", "weights must be finite, not below 0, and not all 0"
                elif lost := [w for w, n in zip(weights, shares(weights).tolist(), strict=True) if w and not n]:
                    share = lost[0] / sum(weights)
                    yield f"schedule.{number}.weights", f"a share of {share:.2g} is no row in {PERIOD:,}: raise it"

        def mask(self) -> MaskKind:
            return "document" if any(source.data.mask() == "document" for source in self.sources) else "causal"

        def validation_problems(self) -> Iterator[tuple[str, str]]:
            """None of the sources has rows for validation."""
            found = [list(source.data.validation_problems()) for source in self.sources]
            if found and all(found):
                for number, problems in enumerate(found):
                    yield from ((f"sources.{number}.data.{name}", message) for name, message in problems)

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Samples

    def open(self) -> None:
        sources, names = self.config.sources, self.config.names()
        if self.split == "validation":
            held = [not list(source.data.validation_problems()) for source in sources]
            sources, names = list(compress(sources, held)), list(compress(names, held))
        live: dict[str, Any] = {"tokenizer": self.tokenizer, "seq_len": self.seq_len, "seed": self.seed}
        live |= {"split": self.split, "rank": self.rank, "n_ranks": self.n_ranks, "verify": self.verify}
        live["rows_per_step"] = self.rows_per_step
        self.parts: list[Samples] = [source.data.build(**live) for source in sources]
        for part in self.parts:
            if part.in_order:
                raise UserError(f"{part.description}: a mixture reads rows by their numbers, and a stream has none")
        n_rows = [part.n_rows for part in self.parts]
        if self.split == "train":
            self.source_names = names
            weights = [source.weight for source in sources]
            changes = [((stage.step - 1) * self.rows_per_step, stage.weights) for stage in self.config.schedule]
            self.phases, self.n_rows = phases([(0, weights), *changes], n_rows)
            said = [f"{100 * weight / sum(weights):.1f} %" for weight in weights]
            at = [phase.first for phase in self.phases[1:]]
            ends = ", ".join(f"{row:,}" for row in at if row not in {row for row, _ in changes})
            after = f"; sources end at the rows {ends}, and the others go on" if ends else ""
            after += "".join(f"; other weights from step {stage.step:,}" for stage in self.config.schedule)
        else:
            self._firsts = np.cumsum([0, *(n or 0 for n in n_rows)])
            stretches = zip(names, self._firsts.tolist(), self._firsts[1:].tolist(), strict=False)
            self.parts_of_rows = {name: range(first, last) for name, first, last in stretches}
            self.n_rows = self.rows_per_epoch = int(self._firsts[-1])
            said, after = [f"{n:,} rows" for n in n_rows], ""
        parts = [f"{share} {part.description}" for share, part in zip(said, self.parts, strict=True)]
        self.description = f"{'; '.join(parts)}{after}"
        self.fingerprint = json_digest([part.fingerprint for part in self.parts])

    def turns(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each row of the mixture, by its place among `parts`, and the number that the row has in it."""
        if self.split == "validation":
            sources = np.searchsorted(self._firsts, numbers, side="right") - 1
            return sources, numbers - self._firsts[sources]
        which = np.searchsorted([phase.first for phase in self.phases], numbers, side="right") - 1
        sources, rows = np.empty_like(numbers), np.empty_like(numbers)
        for number in np.unique(which).tolist():
            inside = which == number
            sources[inside], rows[inside] = self.phases[number].turns(numbers[inside])
        return sources, rows

    def sources(self, first: int, count: int) -> np.ndarray:
        return self.turns(np.arange(first, first + count))[0]

    def tokens_by_source(self, n_rows: int) -> dict[str, int]:
        counts = np.zeros(len(self.parts), np.int64)
        for phase, after in zip(self.phases, [*self.phases[1:], None], strict=True):
            last = n_rows if after is None else min(n_rows, after.first)
            blocks, rest = divmod(max(last - phase.first, 0), PERIOD)
            counts += blocks * phase.counts + np.bincount(phase.pattern[:rest], minlength=len(self.parts))
        return {name: n * self.seq_len for name, n in zip(self.config.names(), counts.tolist(), strict=True)}

    def rows(self, first: int, count: int) -> Batch:
        mixed = Batch(*torch.empty(4, count, self.seq_len, dtype=torch.int64).unbind())
        sources, rows = self.turns(np.arange(first, first + count))
        for number in np.unique(sources).tolist():
            places = np.flatnonzero(sources == number)
            own = self.parts[number].read(int(rows[places[0]]), len(places))  # a source has its turns in its own order
            for whole_BL, part_BL in zip(mixed, own, strict=True):
                whole_BL[torch.from_numpy(places)] = part_BL
        return mixed


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
