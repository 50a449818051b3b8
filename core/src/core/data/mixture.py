"""Rows of several sources in fixed proportions: which row of which source row i is, is arithmetic."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from math import inf
from typing import Any, Self

import numpy as np
import torch

from core.config.configurable import Configurable
from core.config.errors import UserError
from core.data.packing import Batch, joined_batches
from core.data.phases import PERIOD, phases, shares
from core.data.samples import MaskKind, Samples
from core.data.shards import json_digest


@dataclass(kw_only=True, slots=True)
class MixtureSource(Configurable.Config):
    """One source of a mixture."""

    data: Samples.Config
    """What is read, and how often: a source whose `epochs` are over has no more rows."""
    weight: float = 1.0
    """Its share of the rows, beside the weights of the others."""
    name: str = ""
    """What the record calls it; empty is its number."""

    @classmethod
    def upgrade(cls, data: dict[str, Any], now: Configurable.Config | None = None) -> dict[str, Any]:
        """A source may be stated flat, `dataset` and whatever else beside weight and name, with `max_epochs`."""
        own = {name: data[name] for name in ("weight", "name") if name in data}
        if now is not None or "data" in data or data.keys() == own.keys():
            return data
        rest = {name: value for name, value in data.items() if name not in own}
        if "max_epochs" in rest:
            rest["epochs"] = rest.pop("max_epochs")
        return own | {"data": rest}


@dataclass(kw_only=True, slots=True)
class MixtureStage(Configurable.Config):
    """Other weights from a step on."""

    step: int
    """The first step with these weights."""
    weights: list[float] = field(default_factory=list)
    """One for each source; 0 leaves a source out."""


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
            self._set_phases(n_rows)
            said = [f"{100 * weight / sum(weights):.1f} %" for weight in weights]
            after = "".join(self._announced(names, n_rows))
        else:
            self._firsts = np.cumsum([0, *(n or 0 for n in n_rows)])
            stretches = zip(names, self._firsts.tolist(), self._firsts[1:].tolist(), strict=False)
            self.parts_of_rows = {name: range(first, last) for name, first, last in stretches}
            self.n_rows = self.rows_per_epoch = int(self._firsts[-1])
            said, after = [f"{n:,} rows" for n in n_rows], ""
        parts = [f"{share} {part.description}" for share, part in zip(said, self.parts, strict=True)]
        self.description = f"{'; '.join(parts)}{after}"
        self.fingerprint = json_digest([part.fingerprint for part in self.parts])

    def _set_phases(self, n_rows: Sequence[int | None], step: int = 0, rows: int = 0) -> None:
        """Lay out the rows of a run that had read so many rows after a step, in steps of equally many."""
        before = rows // step if step else self.rows_per_step
        changes = [(0, [source.weight for source in self.config.sources])]
        for stage in self.config.schedule:
            is_past = stage.step <= step
            first = (stage.step - 1) * before if is_past else rows + (stage.step - 1 - step) * self.rows_per_step
            changes.append((first, stage.weights))
        self.phases, self.n_rows = phases(changes, n_rows)

    def _announced(self, names: Sequence[str], n_rows: Sequence[int | None]) -> Iterator[str]:
        """What the head of the run says of sources that end, and of weights that change."""
        ended = set[int]()
        for phase in self.phases[1:]:
            over = {i for i, n in enumerate(n_rows) if n is not None and phase.bases[i] >= n} - ended
            ended |= over
            if over:
                those = ", ".join(names[i] for i in sorted(over))
                step = (phase.first - 1) // self.rows_per_step + 1
                yield f"; {those} {'ends' if len(over) == 1 else 'end'} in step {step:,}, and the others go on"
        yield from (f"; other weights from step {stage.step:,}" for stage in self.config.schedule)

    def go_on(self, step: int, rows: int) -> None:
        if self.config.schedule and step and rows % step:
            raise UserError(
                f"{rows:,} rows in {step:,} steps were not equally many in each, so nobody knows at which rows weights "
                "of the schedule changed: go on with the batch size of before, or begin a run"
            )
        self._set_phases([part.n_rows for part in self.parts], step, rows)

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

    def _counts(self, n_rows: int) -> np.ndarray:
        """How many of the first `n_rows` rows are of each source, (sources,)."""
        counts = np.zeros(len(self.parts), np.int64)
        for phase, after in zip(self.phases, [*self.phases[1:], None], strict=True):
            last = n_rows if after is None else min(n_rows, after.first)
            blocks, rest = divmod(max(last - phase.first, 0), PERIOD)
            counts += blocks * phase.counts + np.bincount(phase.pattern[:rest], minlength=len(self.parts))
        return counts

    def tokens_by_source(self, n_rows: int) -> dict[str, int]:
        counts = self._counts(n_rows).tolist()
        tokens = [part.tokens_before(n) for part, n in zip(self.parts, counts, strict=True)]
        return dict(zip(self.config.names(), tokens, strict=True))

    def tokens_before(self, n_rows: int) -> int:
        return sum(self.tokens_by_source(n_rows).values())

    def epochs_by_source(self, n_rows: int) -> dict[str, float]:
        counts = self._counts(n_rows).tolist()
        passes = [n / (part.rows_per_epoch or inf) for n, part in zip(counts, self.parts, strict=True)]
        return dict(zip(self.config.names(), passes, strict=True))

    def rows(self, first: int, count: int) -> Batch:
        sources, rows = self.turns(np.arange(first, first + count))
        places = [np.flatnonzero(sources == number) for number in np.unique(sources)]
        own = [self.parts[sources[each[0]]].read(int(rows[each[0]]), len(each)) for each in places]  # in its own order
        turns = torch.from_numpy(np.concatenate(places)).argsort()
        return joined_batches(own).map(lambda part: part[turns])
