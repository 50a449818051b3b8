"""The loss on text that training never sees."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from core.config.configurable import Configurable
from core.config.errors import UserError
from core.data.packing import Batch
from core.data.samples import Samples
from core.runtime.activity import working
from core.step.objective import Objective, valid_tokens
from core.step.rows import microbatches


class Validation(NamedTuple):
    """The loss on held-out text."""

    loss: float
    """Mean over the valid tokens, in nats."""
    bits_per_byte: float | None
    """The same loss over the bytes of text in UTF-8 that those tokens stand for, in bits: it compares between
    tokenizers. None where that text is not known, as of an unknown token."""


class Validator(Configurable):
    """Mean loss per token over the held-out documents."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        enable: bool = False
        """Validate during the run."""
        freq: int = 100
        """Steps between two validations; the last step is always validated."""
        steps: int = -1
        """Batches per validation, each of as many rows as a step, always the same ones; -1 is all held-out text."""

        def problems(self) -> Iterator[tuple[str, str]]:
            if self.freq < 1:
                yield "freq", f"freq {self.freq} must be at least 1"
            if self.steps != -1 and self.steps < 1:
                yield "steps", f"steps {self.steps} must be at least 1, or -1 for all"

    def __init__(
        self,
        config: Config,
        *,
        loader: Samples,
        objective: Objective,
        text_bytes: Callable[[Batch], float],
        rows_per_step: int,
        local_batch_size: int,
    ) -> None:
        """`text_bytes` says how many bytes of text the labels of a batch stand for."""
        self.config, self.loader, self.objective, self.text_bytes = config, loader, objective, text_bytes
        self.rows_per_step, self.local_batch_size = rows_per_step, local_batch_size
        available = loader.n_rows
        if available is None or loader.in_order:
            raise UserError(
                f"{loader.description}: held-out rows must have an end, and be had in any order, on any rank"
            )
        self.rows = available if config.steps == -1 else min(config.steps * rows_per_step, available)

    def due(self, step: int, last_step: int) -> bool:
        return step == last_step or step % self.config.freq == 0

    @working("validation")
    def measure(self, stop: Callable[[], bool]) -> Validation | None:
        """The loss on all rows, every token weighing the same; None when `stop` asked to give up half-way."""
        total, count, n_bytes = 0.0, 0, 0.0
        layout = self.objective.layout
        for part in self.objective.stages:
            part.eval()
        try:
            for first in range(0, self.rows, self.rows_per_step):
                if stop():
                    return None
                batches = microbatches(
                    self.loader,
                    layout,
                    first=first,
                    n_rows=self.rows_per_step,
                    local_batch_size=self.local_batch_size,
                    end=self.rows,
                )
                total += self.objective.evaluate(batches)
                count += valid_tokens(batches)
                n_bytes += math.fsum(map(self.text_bytes, batches))
        finally:
            for part in self.objective.stages:
                part.train()
        (total,), n_valid, n_bytes = layout.sums(total), layout.sum_of_data(count), layout.sum_of_data(n_bytes)
        if n_valid == 0:
            raise UserError("the held-out text has no token that counts for the loss")
        return Validation(total / n_valid, total / n_bytes / math.log(2) if n_bytes > 0 else None)
