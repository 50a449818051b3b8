"""What updates the weights: one class for each method, chosen in a recipe. docs/add-an-optimizer.md makes one."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import inf
from typing import Any

import torch
from torch import Tensor

from core.config.configurable import Configurable
from core.config.errors import UserError, at_most, did_you_mean
from core.optim.weight import LocalWeight, NamedWeight, WholeMatrices

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

        def problems(self) -> Iterator[tuple[str, str]]:
            for name in ("lr", "weight_decay"):
                if not 0 <= getattr(self, name) < inf:
                    yield name, f"{name} {getattr(self, name)} must be a finite number, not negative"

        def weight_problems(self, names: Sequence[str]) -> Iterator[tuple[str, str]]:
            """What does not fit a model with weights of these names: pairs as of `problems`, before it has memory."""
            if self.no_decay != Optimizer.Config().no_decay:
                yield from pattern_problems("no_decay", self.no_decay, names)

        @classmethod
        def upgrade(cls, data: dict[str, Any], now: Configurable.Config | None = None) -> dict[str, Any]:
            """Adam and AdamW were one class with a `name`, which data without a class is about."""
            if "class" in data or (now is not None and "name" not in data):
                return data
            name = data.get("name", "AdamW")
            if name not in list(OLD_NAMES):  # which may be anything that JSON has
                raise UserError(f"optimizer.name: expected {' or '.join(OLD_NAMES)}, got {name}")
            return {"class": OLD_NAMES[name], **{key: value for key, value in data.items() if key != "name"}}

    def __init__(self, config: Config, *, weights: Iterable[NamedWeight], layout: WholeMatrices) -> None:
        """`weights` are those of the model that this rank has a slice of; without a gradient to come they are left out,
        and get no state."""
        self.config, self.layout = config, layout
        self.weights = {weight.name: LocalWeight(weight) for weight in weights if weight.value.requires_grad}
        with torch.no_grad():
            for weight in self.weights.values():
                weight.start_state(self.new_state(weight))

    @abstractmethod
    def new_state(self, weight: LocalWeight) -> dict[str, Tensor]:
        """The tensors that are kept of a weight, by the names under which checkpoints keep them.

        `weight.zeros()` makes one that is spread over the ranks like the weight; any other must be equal on all ranks.
        """

    @abstractmethod
    def update(self, weights: list[LocalWeight], lr_factor: float) -> None:
        """Change `weight.value` and `weight.state` of all these weights, each of which has a `weight.grad`, in place.

        `lr_factor` is the schedule's, from 0 to 1: every peak learning rate is multiplied by it. All ranks that share
        the weights call with the same ones in the same order.
        """

    def weight_decay(self, weight: LocalWeight) -> float:
        """Shrinkage of this weight per step, to be multiplied by the learning rate."""
        exempt = any(fnmatchcase(weight.name, glob) for glob in self.config.no_decay)
        return 0.0 if exempt else self.config.weight_decay

    def map_matrices(
        self, function: Callable[[Tensor], Tensor], weights: Sequence[LocalWeight], slices: Sequence[Tensor]
    ) -> list[Tensor]:
        """This rank's slices of `function` of the whole matrices that `slices` are this rank's part of.

        `function` takes N matrices (N, R, C) to as many of the same shape, each for itself; for a stack of experts it
        may be called with any of them. `slices` are shaped like the slices of `weights`, which must be matrices or
        stacks of them.
        """
        for weight in weights:
            assert weight.is_matrix, f"{weight.name} has axes {weight.axes}: it is neither a matrix nor a stack of them"
        return self.layout.map_matrices(function, [weight.parameter for weight in weights], slices)

    @torch.no_grad()
    def step(self, lr_factor: float) -> None:
        """Update every weight that has a gradient, with `lr_factor` times the peak learning rates."""
        live = [weight for weight in self.weights.values() if weight.parameter.grad is not None]
        if live:
            self.update(live, lr_factor)

    def zero_grad(self) -> None:
        for weight in self.weights.values():
            weight.parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """Gradients of all weights that have one, as they are spread over the ranks, in the order of registration."""
        gradients = (weight.parameter.grad for weight in self.weights.values())
        return [gradient for gradient in gradients if gradient is not None]

    @property
    def state(self) -> dict[str, dict[str, Tensor]]:
        """The tensors that are kept of every weight, by its name and by theirs, as they are spread over the ranks."""
        return {name: weight.stored for name, weight in self.weights.items()}

    def state_keys(self) -> list[str]:
        """The names that tensors of the state have beside the name of their weight, here on this rank."""
        return sorted({key for weight in self.weights.values() for key in weight.stored})


def pattern_problems(field: str, globs: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Globs that fit none of these names of weights, with the nearest names."""
    lost = [glob for glob in globs if not any(fnmatchcase(name, glob) for name in names)]
    if lost:
        kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
        near = did_you_mean(lost[0], kinds, n=3, cutoff=0.4) or f"there are {', '.join(at_most(3, kinds))}"
        yield field, f"no weight is called {', '.join(lost)}; {near}"
