"""An attention kernel as somebody writes it outside of core: no word about ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from core.nn.backends import register_kernel
from core.nn.kernel import KernelUse, Mask, Positions, visible


@register_kernel("tiled")
@dataclass(frozen=True)
class Tiled:
    """Keys are read tile by tile, so that the logits of a row are never there all at once (arXiv:2112.05682)."""

    window: int | None = None
    tile: int = 8

    def problem(self, use: KernelUse) -> str | None:
        return "it has no sinks" if use.sinks else None

    def mask(self, positions: Positions) -> Tensor:
        row, query, key = (torch.arange(n, device=positions.position_BL.device) for n in positions.grid)
        return visible(positions, self.window)(row[:, None, None, None], None, query[:, None], key)

    def __call__(
        self, q_BNLH: Tensor, k_BKMH: Tensor, v_BKMV: Tensor, mask: Mask, *, scale: float, sinks_N: Tensor | None = None
    ) -> Tensor:
        n_each = q_BNLH.shape[1] // k_BKMH.shape[1]
        sides = (side.repeat_interleave(n_each, 1).split(self.tile, 2) for side in (k_BKMH, v_BKMV))
        largest = torch.full_like(q_BNLH[..., :1], torch.finfo(q_BNLH.dtype).min)
        total, out = torch.zeros_like(largest), q_BNLH.new_zeros(())
        for k, v, seen in zip(*sides, mask.split(self.tile, -1), strict=True):
            logits = (scale * q_BNLH @ k.mT).masked_fill(~seen, torch.finfo(q_BNLH.dtype).min)
            before, largest = largest, torch.maximum(largest, logits.detach().amax(-1, keepdim=True))
            weights, kept = (logits - largest).exp(), (before - largest).exp()
            total, out = total * kept + weights.sum(-1, keepdim=True), out * kept + weights @ v
        return out / total
