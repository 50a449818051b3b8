"""Rounds of steps that groups take by themselves: LocalSGD and DiLoCo.

A round begins with equal weights on all groups. Each takes the steps of the round on its own share of the rows, with an
optimizer state of its own; then

    local_sgd   weights = the mean of all groups' (arXiv:1805.09767)
    diloco      d = weights before the round - their mean;  m = momentum m + d;  weights before - lr (d + momentum m)
                (arXiv:2311.08105: SGD with Nesterov momentum, learning rate 0.7, momentum 0.9)

Buffers, the biases of experts, take the mean. A round that a group did not finish is undone, and done again with its
rows dealt out to those that are left.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from core.optim.weight import local_tensor
from core.train.state import trained_tensors
from fault_tolerance.errors import NotCommitted
from fault_tolerance.replicas import Replicas
from fault_tolerance.state import Snapshot


class OuterStep:
    """What ends a round."""

    def __init__(self, replicas: Replicas) -> None:
        self.replicas, self.state = replicas, replicas.state
        found = shared_tensors(self.state.model)
        self._shared = {name: local_tensor(tensor).detach() for name, tensor in found.items()}
        self._moments = {name: local_tensor(moment) for name, moment in self.state.checkpoints.further.items()}
        self._before: Snapshot | None = None

    def begin_round(self) -> None:
        """Keep what a round that is undone goes back to, in the host's memory."""
        header, tensors = self.state.snapshot()
        self._before = Snapshot(header, [tensor.to("cpu", copy=True) for tensor in tensors])

    def undo(self) -> None:
        """Go back to the beginning of the round."""
        assert self._before is not None, "no round has begun"
        self.state.load(self._before)

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        """End the round with `step`: equal weights on all groups. Raises `NotCommitted` when the round is undone."""
        assert self._before is not None, "no round has begun"
        before = dict(zip(self.state.tensors(), self._before.tensors, strict=True))
        moved = {name: before[name].to(tensor.device).float() - tensor for name, tensor in self._shared.items()}
        self.replicas.sum_tensors(moved.values())
        try:
            self.replicas.commit(step)
        except NotCommitted:
            self.undo()
            raise
        for name, tensor in self._shared.items():
            self._step(name, tensor, before[name].to(tensor.device), moved[name] / self.replicas.n)
        self.state.layout.let_go(self.state.built.models)

    def _step(self, name: str, tensor: Tensor, before: Tensor, moved: Tensor) -> None:
        config, moment = self.replicas.config, self._moments.get(f"outer.{name}")
        if moment is not None:
            moment.mul_(config.outer_momentum).add_(moved)
            moved = config.outer_lr * (moved + config.outer_momentum * moment)
        tensor.copy_(before.float() - moved)


def shared_tensors(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model, of any shape, that groups make equal at the end of a round."""
    return {name: tensor for name, tensor in trained_tensors(model).items() if tensor.is_floating_point()}


def outer_momentum(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DiLoCo's momentum of each weight of a model, whose tensors may be of any shape: 0 in fp32, of the shape of the
    weight and spread over the ranks like it."""
    weights = {name: tensor for name, tensor in shared_tensors(model).items() if tensor.requires_grad}
    return {
        f"outer.{name}": torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)
        for name, weight in weights.items()
    }
