"""The loss on text that training never sees."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from core.config.configurable import Configurable
from core.config.errors import UserError
from core.config.fields import Problem
from core.data.packing import Batch
from core.data.samples import Samples
from core.data.sampling import Split
from core.optim.optimizer import Optimizer
from core.runtime.activity import working
from core.step.objective import Objective, valid_tokens
from core.step.rows import microbatches

_PREFIX = "validation/"


class Validation(NamedTuple):
    """The loss on held-out text."""

    loss: float
    """Mean over the valid tokens, in nats."""
    bits_per_byte: float | None
    """The same loss over the bytes of text in UTF-8 that those tokens stand for, in bits: it compares between
    tokenizers. None where that text is not known, as of an unknown token."""
    by_name: Mapping[str, float] = MappingProxyType({})
    """The same loss of each set that has a name, and of each source of a mixture."""


class Stretch(NamedTuple):
    """Rows of a set that is read for validation."""

    name: str
    loader: Samples
    rows: range


class Validator(Configurable):
    """Mean loss per token over the held-out documents."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        enable: bool = False
        """Validate during the run."""
        freq: int = 100
        """Steps between two validations; the last step is always validated."""
        steps: int = -1
        """Batches per validation, each of as many rows as a step, always the same ones; -1 is all held-out text. Of
        several sets so many of each."""
        datasets: dict[str, Samples.Config] = field(default_factory=dict)
        """Sets of one's own by their names, each read whole, in place of what the training data hold out."""
        use_ema: bool = False
        """Measure the means of the weights over steps, `optimizer.ema_decay`, instead of the weights."""

        def problems(self) -> Iterator[tuple[str, str]]:
            if self.freq < 1:
                yield "freq", f"freq {self.freq} must be at least 1"
            if self.steps != -1 and self.steps < 1:
                yield "steps", f"steps {self.steps} must be at least 1, or -1 for all"
            for name in self.datasets:
                if not name or "/" in name:
                    yield "datasets", f"{name!r} is no name: it stands in the record, without a slash"

    def __init__(
        self,
        config: Config,
        *,
        loaders: Mapping[str, Samples],
        objective: Objective,
        optimizer: Optimizer,
        text_bytes: Callable[[Batch], float],
        rows_per_step: int,
        local_batch_size: int,
    ) -> None:
        """`loaders` are the sets by their names; `text_bytes` says how many bytes of text the labels of a batch stand
        for."""
        self.config, self.loaders, self.objective, self.text_bytes = config, dict(loaders), objective, text_bytes
        self.optimizer = optimizer
        self.rows_per_step, self.local_batch_size = rows_per_step, local_batch_size
        self.stretches = [stretch for name, loader in loaders.items() for stretch in self._stretches(name, loader)]

    def _stretches(self, name: str, loader: Samples) -> Iterator[Stretch]:
        if loader.n_rows is None or loader.in_order:
            raise UserError(
                f"{loader.description}: held-out rows must have an end, and be had in any order, on any rank"
            )
        own = name.removeprefix(_PREFIX) if self.config.datasets else ""
        for part, rows in (loader.parts_of_rows or {"": range(loader.n_rows)}).items():
            n = len(rows) if self.config.steps == -1 else min(self.config.steps * self.rows_per_step, len(rows))
            yield Stretch("/".join(filter(None, (own, part))), loader, rows[:n])

    def due(self, step: int, last_step: int) -> bool:
        return step == last_step or step % self.config.freq == 0

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """While this runs, the models do what validation asks of them."""
        stages, layout = self.objective.stages, self.objective.layout
        with self.optimizer.averaged() if self.config.use_ema else nullcontext():
            for part in stages:
                part.eval()
            try:
                yield
            finally:
                for part in stages:
                    part.train()
        if self.config.use_ema:
            layout.let_go(stages)

    @working("validation")
    def measure(self, stop: Callable[[], bool]) -> Validation | None:
        """The loss on all rows, every token weighing the same; None when `stop` asked to give up half-way."""
        sums = {stretch.name: [0.0, 0, 0.0] for stretch in self.stretches}
        layout = self.objective.layout
        with self._evaluating():
            for stretch in self.stretches:
                total, rows = sums[stretch.name], stretch.rows
                for first in range(rows.start, rows.stop, self.rows_per_step):
                    if stop():
                        return None
                    batches = microbatches(
                        stretch.loader,
                        layout,
                        first=first,
                        n_rows=self.rows_per_step,
                        local_batch_size=self.local_batch_size,
                        end=rows.stop,
                    )
                    total[0] += self.objective.evaluate(batches)
                    total[1] += valid_tokens(batches)
                    total[2] += math.fsum(map(self.text_bytes, batches))
        found = {
            name: (*layout.sums(loss), layout.sum_of_data(count), layout.sum_of_data(n_bytes))
            for name, (loss, count, n_bytes) in sums.items()
        }
        loss, n_valid, n_bytes = (math.fsum(each) for each in zip(*found.values(), strict=True))
        if n_valid == 0:
            raise UserError("the held-out text has no token that counts for the loss")
        by_name = {name: loss / n for name, (loss, n, _) in found.items() if name and n}
        return Validation(loss / n_valid, loss / n_bytes / math.log(2) if n_bytes > 0 else None, by_name)


def ema_problems(config: Validator.Config, optimizer: Optimizer.Config) -> Iterator[Problem]:
    """A validation of means that the optimizer does not keep."""
    if config.use_ema and optimizer.ema_decay is None:
        message = "use_ema measures means of the weights that nobody keeps: set optimizer.ema_decay 0.999"
        yield "validator.use_ema", message


def held_out_sets(
    config: Validator.Config, dataloader: Samples.Config, open: Callable[[Samples.Config, Split], Samples]
) -> dict[str, Samples]:
    """What a validator reads, by name: the sets that it names, or else what the training data hold out."""
    if not config.enable:
        return {}
    if not config.datasets:
        return {"validation": open(dataloader, "validation")}
    return {f"{_PREFIX}{name}": open(data.held_out(), "train") for name, data in config.datasets.items()}
