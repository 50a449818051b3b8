"""What updates the weights: one class for each method, chosen in a recipe. docs/add-an-optimizer.md makes one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor

from core.config.configurable import Configurable
from core.config.errors import UserError
from core.optim.few_bits import StateDtype, at_once
from core.optim.groups import Group, group_problems, weight_group
from core.optim.patterns import fits_any, pattern_problems
from core.optim.weight import LocalWeight, NamedWeight, WeightLayout, local_tensor

OLD_NAMES = {"AdamW": "core.optim.adam:AdamW", "Adam": "core.optim.adam:Adam"}
"""The classes that `name` chose before there was a choice of classes."""


class Optimizer(Configurable, ABC):
    """Updates weights from their gradients, once per step; equal on one rank and in every layout.

    A method says which tensors it keeps of a weight (`new_state`) and what a step does (`update`), in this rank's
    slices of weights, gradients and state. An update that needs whole matrices asks `map_matrices` for them. The
    learning rate's schedule is a pure function of the step and comes in as a factor, so the state is all there is to
    save.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        lr: float = 8e-4
        """Peak learning rate; the schedule multiplies it."""
        weight_decay: float = 0.1
        """Shrinkage per step, times the learning rate."""
        no_decay: list[str] = field(default_factory=lambda: ["*norm.weight", "*.bias", "*.sinks"])
        """Names of weights (globs) that are not shrunk. Of the default some fit no weight of some models."""
        state_dtype: StateDtype = "weights"
        """What means of gradients are kept in: the type of the weights, float32, bfloat16 that is rounded
        stochastically, or 8 bits in blocks of 256 (those of vectors stay in float32)."""
        ema_decay: float | None = None
        """Keep a mean of the weights over steps as well, in which a step weighs this much less with each that follows:
        0.999 is a mean over about 1,000 steps."""
        in_backward: bool = False
        """Update each weight as soon as its gradient is there, and free the gradient: the same training in less memory,
        without clipping by a joint norm, accumulation or a pipeline."""
        groups: list[Group] = field(default_factory=list)
        """Weights, by pattern, that differ in learning rate, decay or betas, or are frozen; the first match counts."""

        def problems(self) -> Iterator[tuple[str, str]]:
            for name in ("lr", "weight_decay"):
                if not 0 <= getattr(self, name) < inf:
                    yield name, f"{name} {getattr(self, name)} must be a finite number, not negative"
            if self.ema_decay is not None and not 0 < self.ema_decay < 1:
                yield "ema_decay", f"ema_decay {self.ema_decay} must be between 0 and 1"

        def further_lrs(self) -> dict[str, float]:
            """Peak learning rates besides `lr`, by the names that they have in a run's records."""
            return {}

        def deals_matrices(self) -> bool:
            """Whether an update deals out the whole matrices of all weights to the ranks, at once."""
            return False

        def has_betas(self, weight: NamedWeight) -> bool:
            """Whether the update of a weight has a beta1 and a beta2, which `weight.group.betas` replaces."""
            del weight
            return False

        def weight_problems(self, weights: Sequence[NamedWeight]) -> Iterator[tuple[str, str]]:
            """What does not fit a model with these weights: pairs as of `problems`, before it has memory."""
            names = [weight.name for weight in weights]
            if self.no_decay != Optimizer.Config().no_decay:
                yield from pattern_problems("no_decay", self.no_decay, names)
            yield from group_problems(self.groups, names)
            for i, group in enumerate(self.groups):
                own = (each for each in weights if weight_group(self.groups, each.name) is group)
                lost = [each.name for each in own if not self.has_betas(each)] if group.betas is not None else []
                if lost:
                    yield f"groups.{i}.betas", f"the update of {lost[0]} has no betas: leave them out, or name others"

        @classmethod
        def upgrade(cls, data: dict[str, Any], now: Configurable.Config | None = None) -> dict[str, Any]:
            """Adam and AdamW were one class with a `name`, which data without a class is about."""
            if "class" in data or (now is not None and "name" not in data):
                return data
            name = data.get("name", "AdamW")
            if name not in list(OLD_NAMES):  # which may be anything that JSON has
                raise UserError(f"optimizer.name: expected {' or '.join(OLD_NAMES)}, got {name}")
            return {"class": OLD_NAMES[name], **{key: value for key, value in data.items() if key != "name"}}

    def __init__(self, config: Config, *, weights: Iterable[NamedWeight], layout: WeightLayout) -> None:
        """`weights` are those of the model that this rank has a slice of; without a gradient to come they are left out,
        and get no state."""
        self.config, self.layout = config, layout
        self.weights: dict[str, LocalWeight] = {}
        for weight in weights:
            group = weight_group(config.groups, weight.name)
            if weight.value.requires_grad and not group.frozen:
                self.weights[weight.name] = LocalWeight(weight, group)
        with torch.no_grad():
            for weight in self.weights.values():
                weight.start_state(self.new_state(weight), layout, config.state_dtype, self.never_negative)
                if config.ema_decay is not None:
                    weight.start_average()

    never_negative: Collection[str] = ()
    """Names of states of which no number is below 0: in 8 bits these have twice as many values."""

    @abstractmethod
    def new_state(self, weight: LocalWeight) -> dict[str, Tensor]:
        """The tensors that are kept of a weight, by the names under which checkpoints keep them.

        `weight.zeros()` makes one that is spread over the ranks like the weight, and that is kept in
        `Config.state_dtype`; any other must be equal on all ranks.
        """

    @abstractmethod
    def update(self, weights: list[LocalWeight], lr_factor: float) -> None:
        """Change `weight.value` and `weight.state` of all these weights, each of which has a `weight.grad`, in place.

        `lr_factor` is the schedule's, from 0 to 1, times that of the weights' group: every peak learning rate is
        multiplied by it. It is called once for all weights of equal factors. All ranks that share the weights call with
        the same ones in the same order.
        """

    def weight_decay(self, weight: LocalWeight) -> float:
        """Shrinkage of this weight per step, to be multiplied by the learning rate."""
        if weight.group.weight_decay is not None:
            return weight.group.weight_decay
        return 0.0 if fits_any(weight.name, tuple(self.config.no_decay)) else self.config.weight_decay

    def map_matrices(
        self, function: Callable[[Tensor], Tensor], weights: Sequence[LocalWeight], slices: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """This rank's slices of `function` of the whole matrices that `slices` are this rank's part of, in their order.

        `function` takes N matrices (N, R, C) to as many of the same shape, each for itself; for a stack of experts it
        may be called with any of them. `slices` are shaped like the slices of `weights`, which must be matrices or
        stacks of them. A rank alone computes each when it is asked for, so that no more than one need be there.
        """
        for weight in weights:
            if not weight.is_matrix:
                raise UserError(
                    f"{weight.name} has axes {weight.axes}: it is neither a matrix nor a stack of them, and "
                    f"{type(self).__name__} asks for its whole matrices; update it otherwise, is_matrix tells"
                )
        return self.layout.map_matrices(function, [weight.parameter for weight in weights], slices)

    @torch.no_grad()
    def step(self, lr_factor: float, number: int = 1, weights: Iterable[LocalWeight] | None = None) -> None:
        """Update every weight that has a gradient, or those of `weights`, with `lr_factor` times the peak learning
        rates; `number`, the step's, decides how numbers in bfloat16 are rounded."""
        live: dict[float, list[LocalWeight]] = {}
        for weight in self.weights.values() if weights is None else weights:
            if weight.parameter.grad is not None:
                live.setdefault(weight.group.lr_factor, []).append(weight)
        for factor, alike in live.items():
            for batch in updated_at_once(alike):
                copied = [weight for weight in batch if weight.in_few_bits]
                for weight in copied:
                    weight.open()
                self.update(batch, lr_factor * factor)
                if (decay := self.config.ema_decay) is not None:
                    for weight in batch:
                        weight.add_to_average(decay)
                for weight in copied:
                    weight.close(number)

    @contextmanager
    @torch.no_grad()
    def averaged(self) -> Iterator[None]:
        """While this runs, the weights are their means over steps, those that have none yet as they are."""
        own = {name: weight.value.clone() for name, weight in self.weights.items()}
        for weight in self.weights.values():
            if weight.stored["ema_step"] > 0:
                weight.value.copy_(local_tensor(weight.stored["ema"]))
        try:
            yield
        finally:
            for name, weight in self.weights.items():
                weight.value.copy_(own[name])

    def zero_grad(self) -> None:
        for weight in self.weights.values():
            weight.parameter.grad = None

    def gradients(self, group: Group | None = None) -> list[Tensor]:
        """Gradients of the weights that have one, as they are spread over the ranks, in the order of registration.

        Those of a group that is clipped by itself, or, without one, of all weights that are in no such group.
        """
        chosen = (
            weight.parameter.grad
            for weight in self.weights.values()
            if (weight.group is group if group else weight.group.max_norm is None)
        )
        return [gradient for gradient in chosen if gradient is not None]

    @property
    def state(self) -> dict[str, dict[str, Tensor]]:
        """The tensors that are kept of every weight, by its name and by theirs, as they are spread over the ranks."""
        return {name: weight.stored for name, weight in self.weights.items()}

    def state_keys(self) -> list[str]:
        """The names that tensors of the state have beside the name of their weight, here on this rank."""
        return sorted({key for weight in self.weights.values() for key in weight.stored})


def updated_at_once(weights: Sequence[LocalWeight]) -> Iterator[list[LocalWeight]]:
    """The weights that are updated at once: all of them, or, where copies of what is kept in few bits are made, as many
    have no more numbers than the largest weight, or than few bits are worked on at once. By whole weights, so that all
    ranks have the same."""
    if not any(weight.in_few_bits for weight in weights):
        yield list(weights)
        return
    sizes = [weight.shape.numel() for weight in weights]
    most, batch, n = max(at_once(weights[0].value.detach()), *sizes), [], 0
    for weight in weights:
        if batch and n + weight.shape.numel() > most:
            yield batch
            batch, n = [], 0
        batch.append(weight)
        n += weight.shape.numel()
    yield batch
