"""Updates in the backward pass: of each weight as soon as its gradient is there, which is freed then.

    backward of the head, update, free  ->  backward of the last block, update, free  ->  ...  ->  the embedding

No more gradients live at once than one weight has, or under FSDP, which sums those of a block together, one block. What
is known only when all of them are there, the joint norm for instance, cannot change an update, and is refused; a norm
that is stated in advance can.
"""

from collections.abc import Iterator
from functools import partial
from math import inf
from typing import Self

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from core.config.fields import Problem
from core.optim.clip import cut_values, scale_down
from core.optim.optimizer import Optimizer
from core.optim.weight import LocalWeight, local_tensor
from core.parallel.layout import RankView
from core.parallel.settings import Degrees, Parallelism
from core.step.settings import Debug, Training


class UpdateInBackward:
    """While the block runs, a backward updates the weights whose gradients it makes, once, and frees these."""

    def __init__(
        self,
        optimizer: Optimizer,
        layout: RankView,
        *,
        step: int,
        lr_factor: float,
        max_norm: float,
        fixed_norm: float | None,
        max_value: float | None,
    ) -> None:
        self.optimizer, self.layout = optimizer, layout
        self.step, self.lr_factor = step, lr_factor
        self.max_norm, self.fixed_norm, self.max_value = max_norm, fixed_norm, max_value
        self._squares: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for weight in self.optimizer.weights.values():
            hook = weight.parameter.register_post_accumulate_grad_hook(partial(self._update, weight))
            self._hooks.append(hook)
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _update(self, weight: LocalWeight, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None and weight.name not in self._squares, f"{weight.name}: two backwards in a step"
        self._squares[weight.name] = self.layout.squared_norms([gradient])
        if self.fixed_norm is not None:
            scale_down([local_tensor(gradient)], self.fixed_norm, self.max_norm)
        if self.max_value is not None:
            cut_values([local_tensor(gradient)], self.max_value)
        self.optimizer.step(self.lr_factor, self.step, [weight])
        parameter.grad = None

    def norm(self) -> float:
        """The joint norm that all gradients had, before they were scaled or cut."""
        squares = [self._squares[name] for name in self.optimizer.weights if name in self._squares]
        return self.layout.joint_norm(torch.cat(squares))


def in_backward_problems(
    optimizer: Optimizer.Config, training: Training, parallelism: Parallelism, debug: Debug, degrees: Degrees
) -> Iterator[Problem]:
    """What a run asks for that is not known yet when a weight is updated in backward."""
    if not optimizer.in_backward:
        return
    each = "optimizer.in_backward updates a weight as soon as its gradient is there"
    if training.max_norm < inf and training.fixed_norm is None:
        yield (
            "training.max_norm",
            f"{each}, and max_norm {training.max_norm} needs the joint norm of all: set training.max_norm inf; "
            "training.max_value cuts each number by itself, and training.fixed_norm states the norm in advance",
        )
    for i, group in enumerate(optimizer.groups):
        if group.max_norm is not None and group.max_norm < inf:
            yield (
                f"optimizer.groups.{i}.max_norm",
                f"{each}, and max_norm {group.max_norm} needs the joint norm of the group: leave it out",
            )
    rows, at_once = training.rows_per_step(degrees.data), training.local_batch_size * degrees.data
    if rows > at_once:
        yield (
            "training.global_batch_size",
            f"{each}, and {rows} rows in microbatches of {at_once} add up {-(-rows // at_once)} gradients: set "
            f"local_batch_size {rows // degrees.data}, or unset in_backward",
        )
    if degrees.pipeline > 1:
        yield (
            "parallelism.pipeline_parallel_degree",
            f"{each}, and a pipeline adds up those of its microbatches: use pipeline_parallel_degree 1, not "
            f"{degrees.pipeline}",
        )
    if parallelism.cpu_offload:
        yield "parallelism.cpu_offload", f"{each}, on the device, and cpu_offload has weights elsewhere: choose one"
    if degrees.world > 1 and optimizer.deals_matrices():
        yield (
            "optimizer.in_backward",
            f"the optimizer deals its matrices out to {degrees.world} ranks, which needs the gradients of all: use one "
            "rank, or unset in_backward",
        )
    for name in ("on_nonfinite", "on_spike"):
        if getattr(debug, name) == "skip":
            yield (
                f"debug.{name}",
                f"{each}, before it is known whether the step is to be left out: unset one of the two",
            )
