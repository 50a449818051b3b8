"""The rows of steps, those of the next read in a thread while a step is computed."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch.profiler import record_function

from core.data.packing import Batch
from core.data.samples import Samples
from core.parallel.layout import RankView
from core.step.rows import microbatches, own_rows
from core.step.source_losses import SourceLosses, StepSources

ROWS_EVENT = "rows of the step"
"""What a trace calls the wait for the rows of a step, or the reading of them."""


class RowsAhead:
    """This rank's microbatches of a step. Rows that are read in order, with a place to save, are not read ahead."""

    def __init__(
        self,
        loader: Samples,
        layout: RankView,
        first_row: Callable[[int], int],
        *,
        n_rows: int,
        local_batch_size: int,
        last_step: int,
    ) -> None:
        """A step, counted from 1, reads `n_rows` rows over all ranks, from `first_row(step)` on."""
        self.loader, self.layout, self.first_row, self.last_step = loader, layout, first_row, last_step
        self.sizes = {"n_rows": n_rows, "local_batch_size": local_batch_size}
        self.source_losses = SourceLosses(loader.source_names)
        self._next: tuple[int, Future[list[Batch]]] | None = None
        self._thread = ThreadPoolExecutor(1, "rows")
        self._waited_s, self._steps = 0.0, 0

    def read(self, step: int) -> list[Batch]:
        """The microbatches of `step`, read here and now."""
        return microbatches(self.loader, self.layout, first=self.first_row(step), **self.sizes)

    def sources(self, step: int) -> StepSources | None:
        """What the rows of the microbatches of `step` are from; None where that is one source."""
        if not self.source_losses.names:
            return None
        n = self.sizes["local_batch_size"]
        found = [self.loader.sources(own, n) for own in own_rows(self.layout, first=self.first_row(step), **self.sizes)]
        return StepSources(list(map(torch.from_numpy, found)), self.source_losses)

    def __call__(self, step: int) -> list[Batch]:
        """The microbatches of `step`; those of the next are begun to be read. What is waited has a place in traces."""
        began = time.perf_counter()
        ahead, self._next = self._next, None
        with record_function(ROWS_EVENT):
            batches = ahead[1].result() if ahead is not None and ahead[0] == step else self.read(step)
        self._waited_s += time.perf_counter() - began
        self._steps += 1
        if step < self.last_step and not self.loader.in_order:
            self._next = step + 1, self._thread.submit(self.read, step + 1)
        return batches

    def take_wait_s(self) -> float:
        """Mean over the steps since it was asked last of the seconds that a step waited for its rows."""
        waited_s, steps = self._waited_s, max(self._steps, 1)
        self._waited_s, self._steps = 0.0, 0
        return waited_s / steps

    def close(self) -> None:
        """Read no further."""
        self._thread.shutdown(cancel_futures=True)
