"""The rows of a step dealt out to the groups that are there."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any

import torch

from core.data.packing import Batch
from core.data.samples import Samples
from core.parallel.layout import RankView
from core.step.rows import own_rows
from core.step.rows_ahead import RowsAhead
from core.step.settings import Training
from core.step.source_losses import StepSources


class DealtRows(RowsAhead):
    """This rank's microbatches of a step, of which each group has those that its turn comes to.

        microbatch of a rank     0 1 2 3 4 5
        group, of two            0 1 0 1 0 1
        group, of one            0 0 0 0 0 0

    A row of a step has the same number in the data whoever reads it.
    """

    def __init__(self, loader: Samples, layout: RankView, first_row: Callable[[int], int], **sizes: Any) -> None:
        super().__init__(loader, layout, first_row, **sizes)
        self.number, self.n = 0, 1
        self._reading = Lock()  # a share that was dealt anew is read beside what is read ahead

    def deal(self, number: int, n: int) -> None:
        """From now on read the share of group `number` of `n`."""
        if (number, n) != (self.number, self.n):
            self._next = None  # it was read for another share
        self.number, self.n = number, n

    def starts(self, step: int) -> Sequence[int]:
        """The first row of each of the microbatches."""
        return own_rows(self.layout, first=self.first_row(step), **self.sizes)[self.number :: self.n]

    def read(self, step: int) -> list[Batch]:
        with self._reading:
            return [self.loader.read(first, self.sizes["local_batch_size"]) for first in self.starts(step)]

    def sources(self, step: int) -> StepSources | None:
        starts = self.starts(step)
        if not self.source_losses.names or not starts:
            return None
        found = [self.loader.sources(first, self.sizes["local_batch_size"]) for first in starts]
        return StepSources(list(map(torch.from_numpy, found)), self.source_losses)


def over_groups(training: Training, n_data: int, n_groups: int) -> Training:
    """The settings with the rows of a step over all groups of `n_data` ranks that read different ones: one microbatch
    for each of these ranks where nothing is stated."""
    if training.global_batch_size != -1:
        return training
    return replace(training, global_batch_size=training.rows_per_step(n_data) * n_groups)
