"""A weight as an optimizer sees it: the names of its axes, this rank's slice of it, and on request whole matrices.

    local slice    what this rank stores of a weight, of its gradient and of its state, at equal places of all three: an
                   update that treats each number alone is written in slices
    whole matrix   a weight of two axes, or one of a stack of them ("experts"), put together from the slices of all
                   ranks for an update that needs it whole

Letters: N matrices of a stack (1 where there is none), R rows, C columns.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from core.optim.few_bits import NUMBERS_PER_SCALE, AsItIs, Draw, InBlocks, Kept, Rounded, StateDtype
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


class WeightLayout(Protocol):
    """What the layout of a run does for an optimizer."""

    def map_matrices(
        self, function: Callable[[Tensor], Tensor], weights: Sequence[Tensor], slices: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """This rank's slices of `function` of whole matrices (N, R, C), of which a rank alone computes one at a time.

        `slices` are this rank's of tensors that are cut as `weights` are, matrices or stacks of them. A collective.
        """
        ...

    def local_slice(self, weight: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The piece of a weight, of any shape, that lies on this rank, and where it begins in the whole."""
        ...

    def row_blocks(self, weight: Tensor, size: int) -> Tensor:
        """Zeros in fp32, one for each block of `size` numbers in the rows of a weight (..., C), on the ranks that have
        these."""
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
        """This rank's slices of the state, to be changed in place; those in few bits are there during an update."""
        self._kept: dict[str, Kept] = {}
        self._rounded = self.in_few_bits = self.parameter.dtype == torch.bfloat16
        """Whether the weight is; and, as the states say as well, whether an update works on copies of what is kept."""
        self._start: tuple[int, ...] = ()
        """Where the slice begins in the whole."""
        self._opened: tuple[Tensor, Tensor] | None = None

    @property
    def value(self) -> Tensor:
        """This rank's slice of the weight, in an update of at least fp32."""
        return local_tensor(self.parameter) if self._opened is None else self._opened[0]

    @property
    def grad(self) -> Tensor:
        """This rank's slice of the gradient. Of a weight without one there is none to ask for."""
        assert self.parameter.grad is not None, f"{self.name} has no gradient"
        return local_tensor(self.parameter.grad) if self._opened is None else self._opened[1]

    def start_average(self) -> None:
        """Keep a mean of the weight's values in fp32, which begins with the first that is added."""
        self.stored |= {"ema": self.zeros(torch.float32), "ema_step": torch.zeros((), device=self.value.device)}

    def add_to_average(self, decay: float) -> None:
        """Add the weight's value to its mean, in which those before weigh `decay` times as much as they did."""
        count = self.stored["ema_step"].add_(1)
        local_tensor(self.stored["ema"]).lerp_(self.value.float(), (1 - decay) / (1 - decay**count))

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix or a stack of matrices: by its axes, since a stack of vectors has two as well."""
        return names_matrix(self.axes)

    def zeros(self, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros for the state, of the weight's shape and spread over the ranks like it; without `dtype` of its type."""
        dtype = self.parameter.dtype if dtype is None else dtype
        if self.parameter.is_meta and local_tensor(self.parameter) is self.parameter:
            return torch.zeros(self.shape, dtype=dtype, device="meta")  # zeros_like would load sympy: 0.4 s
        return torch.zeros_like(self.parameter, dtype=dtype, requires_grad=False)

    def start_state(
        self, state: dict[str, Tensor], layout: WeightLayout, dtype: StateDtype, never_negative: Collection[str]
    ) -> None:
        """Keep `state`, tensors of any shape, by the names that it is saved by; those like the weight in `dtype`."""
        for key, tensor in state.items():
            of_weight = tensor.dim() > 0 and tensor.shape == self.shape and tensor.is_floating_point()
            if of_weight and dtype == "8-bit" and self.is_matrix:
                codes = torch.zeros_like(tensor, dtype=torch.uint8)
                self.stored |= {key: codes, f"{key}_scale": layout.row_blocks(self.parameter, NUMBERS_PER_SCALE)}
                scales = local_tensor(self.stored[f"{key}_scale"])
                self._kept[key] = InBlocks(local_tensor(codes), scales, signed=key not in never_negative)
                continue
            if of_weight and dtype != "weights":
                tensor = tensor.to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
            self.stored[key] = tensor
            kind = Rounded if tensor.dtype == torch.bfloat16 else AsItIs
            self._kept[key] = kind(local_tensor(tensor))
        self.in_few_bits = self._rounded or not all(isinstance(each, AsItIs) for each in self._kept.values())
        if self.in_few_bits:
            _, self._start = layout.local_slice(self.parameter)
        else:
            self.state = MappingProxyType({key: each.read() for key, each in self._kept.items()})

    def open(self) -> None:
        """Have `value`, `grad` and `state` of a weight in few bits be what an update changes."""
        value, grad = self.value, self.grad
        self._opened = (value.float(), grad.float()) if self._rounded else (value, grad)
        self.state = MappingProxyType({key: each.read() for key, each in self._kept.items()})

    def close(self, step: int) -> None:
        """Keep what an update made of them, in a step of this number."""
        assert self._opened is not None, f"{self.name} is not open"
        if self._rounded:
            kept = Rounded(local_tensor(self.parameter))
            kept.write(self._opened[0], Draw(f"{step}/{self.name}", self._start, self.shape))
        for key, each in self._kept.items():
            each.write(self.state[key], Draw(f"{step}/{self.name}.{key}", self._start, self.shape))
        self._opened, self.state = None, MappingProxyType({})


def names_matrix(axes: Sequence[str]) -> bool:
    """Whether a weight with these axes is a matrix or a stack of matrices."""
    return len(axes) - (STACK in axes) == 2


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's slice of a tensor of any shape that is spread over ranks; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def local_bytes(tensor: Tensor | None) -> int:
    """Bytes of a tensor of any shape that lie on this rank; of None none."""
    return 0 if tensor is None else local_tensor(tensor).nbytes
