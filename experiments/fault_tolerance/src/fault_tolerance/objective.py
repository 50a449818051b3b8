"""The loss of a step over all groups, and its gradient."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from core.data.packing import Batch
from core.nn.balance import routers
from core.nn.decoder import Decoder
from core.optim.optimizer import Optimizer
from core.optim.weight import local_tensor
from core.step.loss import Loss
from core.step.objective import Objective
from core.step.source_losses import Tally
from fault_tolerance.replicas import Replicas


class GroupObjective(Objective):
    """An `Objective` of which each group has its microbatches' part; in a step (`shared`) the parts are added up.

    What the groups add up is complete or the step is not: `NotCommitted` is raised before anything has changed.
    """

    def __init__(self, stages: list[Decoder], loss: Loss, *, optimizer: Optimizer, **settings: Any) -> None:
        super().__init__(stages, loss, **settings)
        self.optimizer = optimizer
        self._replicas: Replicas | None = None
        self._step = 0

    @contextmanager
    def shared(self, replicas: Replicas, step: int) -> Iterator[None]:
        """While this runs, what is computed is the part of a group of `step`."""
        self._replicas, self._step = replicas, step
        try:
            yield
        finally:
            self._replicas = None

    def n_valid(self, batches: Sequence[Batch]) -> float:
        """As in core; of all groups."""
        own = super().n_valid(batches)
        if self._replicas is None:
            return own
        (total,) = self._replicas.sums(own)
        self._replicas.check()
        return total

    def accumulate(
        self, batches: Sequence[Batch], n_valid: float, tallies: Sequence[Tally] = ()
    ) -> tuple[float, float]:
        """As in core; with the gradients of all groups, their losses, and the loads of experts."""
        losses = super().accumulate(batches, n_valid, tallies) if batches else (0.0, 0.0)
        if self._replicas is None:
            return losses
        found = self._add_up(self._replicas, losses)
        self._replicas.commit(self._step)
        return found

    @torch.no_grad()
    def _add_up(self, replicas: Replicas, losses: tuple[float, float]) -> tuple[float, float]:
        weights = [weight.parameter for weight in self.optimizer.weights.values()]
        counts = [count for stage in self.stages for count in counted(stage)]
        have = [float(weight.grad is not None) for weight in weights]
        numbers = [number for count in counts for number in count.double().view(-1).tolist()]
        main, total, *rest = replicas.sums(*losses, *have, *numbers)
        for count in counts:
            there, rest[len(have) :] = rest[len(have) :][: count.numel()], rest[len(have) :][count.numel() :]
            count.copy_(torch.tensor(there, dtype=torch.float64).view_as(count))
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        replicas.sum_tensors(local_tensor(weight.grad) for weight in weights if weight.grad is not None)
        for weight, anywhere in zip(weights, rest[: len(have)], strict=True):
            if not anywhere:
                weight.grad = None  # no group's rows use it: it is left alone, as in a run of one group
        return main, total


def counted(model: Decoder) -> Iterator[Tensor]:
    """What routers of a model count in a step, tensors of any shape."""
    for router in routers(model).values():
        yield router.tokens_E
        yield router.balance_loss
