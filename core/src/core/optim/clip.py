"""Clipping by the global norm."""

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


def scale_down(gradients: list[Tensor], norm: float, max_norm: float) -> None:
    """Scale in place gradients whose joint norm is `norm` so that it is at most `max_norm`."""
    torch._foreach_mul_(gradients, min(max_norm / (norm + 1e-6), 1.0))


def clip_gradients(gradients: list[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients in place so that their joint 2-norm is at most `max_norm`; gives the norm before."""
    norm = get_total_norm(gradients)
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
