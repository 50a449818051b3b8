"""Multi-token prediction: what stands between the main model and a block that predicts one token further.

Letters: B rows, L length, D width, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from core.nn.layers import Linear, RMSNorm
from core.nn.module import Module


class Predictions(NamedTuple):
    """What was read of the next token, and of the ones after it: `further` number k is about the token k + 2 places on.

    These are logits (B, L, V), or what a `core.nn.decoder.Reader` makes of them.
    """

    main: Tensor
    further: list[Tensor]


class Merge(Module):
    """What was known before, joined with the token that came next (arXiv:2412.19437, equation 21).

    `norm` is for the result of the block behind it, which the head and the next Merge read: as after the main model.
    """

    AXES = {"enorm": ("embed",), "hnorm": ("embed",), "eh_proj": ("embed", "merge"), "norm": ("embed",)}

    def __init__(self, dim: int, *, norm_eps: float, std: float) -> None:
        super().__init__()
        self.enorm = RMSNorm(dim, eps=norm_eps)
        self.hnorm = RMSNorm(dim, eps=norm_eps)
        self.eh_proj = Linear(2 * dim, dim, std=std)
        self.norm = RMSNorm(dim, eps=norm_eps)

    def forward(self, h_BLD: Tensor, next_BLD: Tensor) -> Tensor:
        return self.eh_proj(torch.cat((self.enorm(next_BLD), self.hnorm(h_BLD)), -1))
