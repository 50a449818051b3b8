"""A weight as an optimizer sees it: the names of its axes, this rank's slice of it, and on request whole matrices.

    local slice    what this rank stores of a weight, of its gradient and of its state, at equal places of all three: an
                   update that treats each number alone is written in slices
    whole matrix   a weight of two axes, or one of a stack of them ("experts"), put together from the slices of all
                   ranks for an update that needs it whole

Letters: N matrices of a stack (1 where there is none), R rows, C columns.
"""

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from core.optim.groups import EVERYTHING, Group

STACK = "experts"
"""The axis that numbers equal matrices; it comes first."""


class NamedAxes(Protocol):
    """What a weight of a model is called, and its axes."""

    @property
    def name(self) -> str: ...

    @property
    def axes(self) -> tuple[str, ...]: ...


class NamedWeight(NamedAxes, Protocol):
    """A weight of a model, with the parameter as it is stored."""

    @property
    def value(self) -> nn.Parameter: ...


class WholeMatrices(Protocol):
    """What the layout of a run does for an optimizer whose update needs whole matrices."""

    def map_matrices(
        self, function: Callable[[Tensor], Tensor], weights: Sequence[Tensor], slices: Sequence[Tensor]
    ) -> list[Tensor]:
        """This rank's slices of `function` of whole matrices (N, R, C).

        `slices` are this rank's of tensors that are cut as `weights` are, matrices or stacks of them. A collective.
        """
        ...


class LocalWeight:
    """A weight, and what this rank holds of it, of its gradient and of its state."""

    def __init__(self, weight: NamedWeight, group: Group = EVERYTHING) -> None:
        self.name, self.axes, self.parameter, self.group = weight.name, weight.axes, weight.value, group
        self.shape = self.parameter.shape
        """Of the whole weight."""
        self.stored: dict[str, Tensor] = {}
        """The state as it is saved: tensors that are spread over the ranks like the weight, or equal on all."""
        self.state: MappingProxyType[str, Tensor] = MappingProxyType({})
        """This rank's slices of the state, to be changed in place."""

    @property
    def value(self) -> Tensor:
        """This rank's slice of the weight."""
        return local_tensor(self.parameter)

    @property
    def grad(self) -> Tensor:
        """This rank's slice of the gradient. Of a weight without one there is none to ask for."""
        assert self.parameter.grad is not None, f"{self.name} has no gradient"
        return local_tensor(self.parameter.grad)

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix or a stack of matrices: by its axes, since a stack of vectors has two as well."""
        return names_matrix(self.axes)

    def zeros(self, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros for the state, of the weight's shape and spread over the ranks like it; without `dtype` of its type."""
        return torch.zeros_like(self.parameter, dtype=dtype, requires_grad=False)

    def start_state(self, state: dict[str, Tensor]) -> None:
        """Keep `state`, tensors of any shape, by the names under which it is saved."""
        self.stored = state
        self.state = MappingProxyType({key: local_tensor(tensor) for key, tensor in state.items()})


def names_matrix(axes: Sequence[str]) -> bool:
    """Whether a weight with these axes is a matrix or a stack of matrices."""
    return len(axes) - (STACK in axes) == 2


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's slice of a tensor of any shape that is spread over ranks; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
