"""Weights are drawn by (seed, name of the weight), so that a start does not depend on order, layout or model size."""

import hashlib
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Normal(NamedTuple):
    """A normal distribution around zero, cut at `cut` standard deviations on both sides."""

    std: float
    cut: float = 3.0

    def draw(self, out: Tensor, generator: torch.Generator) -> None:
        """Fill `out` by inverting the distribution function: one uniform number per weight, whatever the others are."""
        share = math.erf(self.cut / math.sqrt(2))
        out.uniform_(-share, share, generator=generator).erfinv_().mul_(self.std * math.sqrt(2))
        out.clamp_(-self.cut * self.std, self.cut * self.std)


class Constant(NamedTuple):
    """The same number everywhere."""

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


def materialise(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give every meta weight of `model` memory on `device`; tied weights stay one tensor; buffers keep their values."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False, remove_duplicate=False):
            assert value.is_meta, f"{type(module).__name__}.{name} has a value, which would be lost"
            if value not in made:
                made[value] = nn.Parameter(torch.empty(value.shape, device=device, dtype=dtype), value.requires_grad)
            setattr(module, name, made[value])
        for name, value in module.named_buffers(recurse=False):
            assert not value.is_meta, f"{type(module).__name__}.{name} must be built on a real device"
            setattr(module, name, value.to(device))


@torch.no_grad()
def init_weights(starts: Iterable[tuple[str, Tensor, Start]], seed: int) -> None:
    """Draw each (name, weight, start) from its own random stream, in fp32, on the weight's device."""
    for name, value, start in starts:
        key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator(value.device).manual_seed(int.from_bytes(key[:8], "little") >> 1)
        exact = value.dtype == torch.float32
        out = value if exact else torch.empty(value.shape, dtype=torch.float32, device=value.device)
        start.draw(out, generator)
        if not exact:
            value.copy_(out)
