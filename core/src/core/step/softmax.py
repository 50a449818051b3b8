"""Cross-entropy with its gradient in closed form: one exponential of each logit, in the memory of the logits.

PyTorch's graph of the same formula keeps the log-softmax, fills a gradient of zeros for the labels, and computes the
exponential again; torch.compile makes one kernel of it, and is given the formula itself.

Letters: B rows, L tokens that the labels are given for, l those of them that are this rank's, v this rank's words.
"""

from typing import Any

import torch
from torch import Tensor

from core.parallel.vocabulary import Vocabulary


class SoftmaxLoss(torch.autograd.Function):
    """Nats (B, l) of fp32 logits (B, L, v), which it writes over; backward runs once.

    With z the log-partition, y the logit of the label, m the mean of all logits, s the share of smoothing and w the
    weight of the z-loss, a token costs z + w z^2 - (1 - s) y - s m. The gradient by a logit of softmax p is

        (1 + 2 w z) p - (1 - s) [is the label] - s / V

    and, where logits are capped at c, that times 1 - (logit / c)^2.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_BLv: Tensor,
        labels_BL: Tensor,
        vocabulary: Vocabulary,
        z_loss: float,
        smoothing: float,
        soft_cap: float | None,
    ) -> Tensor:
        capped_BLv = None
        if soft_cap is not None:
            capped_BLv = logits_BLv.div_(soft_cap).tanh_().mul_(soft_cap)
        index_BL1, own_BL1 = vocabulary.find(labels_BL)
        wanted_BL1 = torch.zeros_like(own_BL1, dtype=logits_BLv.dtype)
        if logits_BLv.shape[-1]:
            wanted_BL1 = logits_BLv.gather(-1, index_BL1).mul_(own_BL1).mul_(1 - smoothing)
        if smoothing:
            wanted_BL1 += logits_BLv.sum(-1, keepdim=True).mul_(smoothing / vocabulary.size)
        max_BL = vocabulary.max(logits_BLv)
        exp_BLv = logits_BLv.sub_(max_BL.unsqueeze(-1)) if capped_BLv is None else capped_BLv - max_BL.unsqueeze(-1)
        exp_BLv.exp_()
        sum_BL = vocabulary.total(exp_BLv.sum(-1))
        z_BL = sum_BL.log() + max_BL
        ctx.vocabulary, ctx.settings = vocabulary, (z_loss, smoothing, soft_cap)
        ctx.save_for_backward(exp_BLv, capped_BLv, index_BL1, own_BL1, sum_BL, z_BL)
        z_Bl = vocabulary.own_tokens(z_BL)
        return z_Bl + z_loss * z_Bl.square() - vocabulary.sum(wanted_BL1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        exp_BLv, capped_BLv, index_BL1, own_BL1, sum_BL, z_BL = ctx.saved_tensors
        z_loss, smoothing, soft_cap = ctx.settings
        gradient_BL = ctx.vocabulary.all_tokens(grads[0])
        gradient_BLv = exp_BLv.mul_((gradient_BL * (1 + 2 * z_loss * z_BL) / sum_BL).unsqueeze(-1))
        gradient_BL1 = gradient_BL.unsqueeze(-1)
        if gradient_BLv.shape[-1]:
            gradient_BLv.scatter_add_(-1, index_BL1, gradient_BL1 * own_BL1 * (smoothing - 1))
        if smoothing:
            gradient_BLv.sub_(gradient_BL1 * (smoothing / ctx.vocabulary.size))
        if soft_cap is not None:
            gradient_BLv.addcmul_(gradient_BLv, (capped_BLv / soft_cap).square_(), value=-1)
        return gradient_BLv, *[None] * 5
