"""How a weight starts: the distribution that its numbers are drawn from."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Normal(NamedTuple):
    """A normal distribution around zero, cut at `cut` standard deviations on both sides."""

    std: float
    cut: float = 3.0

    def draw(self, out: Tensor, generator: torch.Generator) -> None:
        """Fill `out`, of any shape, by inverting the distribution function: one uniform number per weight, whatever the
        others are."""
        share = math.erf(self.cut / math.sqrt(2))
        out.uniform_(-share, share, generator=generator).erfinv_().mul_(self.std * math.sqrt(2))
        out.clamp_(-self.cut * self.std, self.cut * self.std)


class Constant(NamedTuple):
    """The same number everywhere, in any shape."""

    value: float

    def draw(self, out: Tensor, generator: torch.Generator) -> None:
        del generator
        out.fill_(self.value)


Start = Normal | Constant


class Scale(NamedTuple):
    """Standard deviations of a model's matrices: `residual` where they write to the residual stream, else `std`.

    The residual stream sums two writes per block, so the writers are drawn smaller by sqrt(2 n_layers) to keep its
    variance independent of the depth (GPT-2).
    """

    std: float
    residual: float

    @classmethod
    def of_depth(cls, std: float, n_layers: int) -> "Scale":
        return cls(std, std / (2 * n_layers) ** 0.5)
