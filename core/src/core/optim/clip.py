"""Clipping: by a joint norm, or number by number."""

import torch
from torch import Tensor


def squared_norms(gradients: list[Tensor]) -> Tensor:
    """The square of the 2-norm of each gradient, of any shape, (n,) in fp64."""
    if not gradients:
        return torch.zeros(0, dtype=torch.float64)
    return torch.stack(torch._foreach_norm(gradients)).double().square()


def scale_down(gradients: list[Tensor], norm: float, max_norm: float) -> None:
    """Scale in place gradients, of any shape, whose joint norm is `norm` so that it is at most `max_norm`."""
    factor = min(max_norm / (norm + 1e-6), 1.0)
    if gradients and factor != 1.0:
        torch._foreach_mul_(gradients, factor)


def cut_values(gradients: list[Tensor], max_value: float) -> None:
    """Cut each number of gradients, of any shape, to at most `max_value` in size, in place."""
    if gradients:
        torch._foreach_clamp_max_(gradients, max_value)
        torch._foreach_clamp_min_(gradients, -max_value)
