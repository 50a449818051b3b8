"""The head and the loss of some tokens after the other, so that the logits of a batch never exist whole.

A loss is a sum over tokens, so what the gradient of a token's logits is depends on no other token. Of each chunk the
logits, their loss, the gradient of the logits and what that gives for the residual stream and for the head's weight are
computed in turn, in the forward pass; a chunk's logits are gone before the next one's exist. These are the three matrix
products that the head costs in any case. Backward has only to hand out what was kept: the gradient of the residual
stream (T, D), and that of the weight (v, D), which is summed in fp32 whatever the products compute in. To recompute the
logits in backward instead would keep neither, for a fourth product: where backward of the head follows its forward, as
it does in every schedule but those that run all forwards first, the peak is the same.

Tokens without a label are left out before the product. How many count is known to the host since it read the rows, so
that nobody waits for a device.

Letters: B rows, L length, T = B L tokens, C tokens of a chunk, D width of the residual stream, v this rank's words.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from core.data.packing import IGNORE

TokenLosses = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Nats of tokens from their fp32 logits (1, C, v), which it may write over, labels (1, C) and sources (1, C)."""


class WithGradient(torch.autograd.Function):
    """A value, and the gradient of one tensor by it that is known already; backward runs once."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor, tensor: Tensor, gradient: Tensor) -> Tensor:
        """The value (); the tensor and its gradient have any shape."""
        ctx.save_for_backward(gradient)
        ctx.dtype = tensor.dtype  # pyrefly: ignore[missing-attribute] - what a context is for
        return value.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors  # pyrefly: ignore[missing-attribute]
        return None, gradient.mul_(grads[0]).to(ctx.dtype), None  # pyrefly: ignore[missing-attribute]


def sum_in_chunks(
    x_BLD: Tensor,
    weight_vD: Tensor,
    labels_BL: Tensor,
    losses: TokenLosses,
    *,
    chunk_tokens: int,
    n_labels: int,
    scale: float,
    sources_BL: Tensor | None = None,
) -> Tensor:
    """The sum of `losses` times `scale`, in fp32: of the `n_labels` first tokens, those with a label coming first.

    Products compute in the dtype of autocast, or else of the weight.
    """
    x_TD, labels_T, order_T = x_BLD.detach().flatten(0, 1), labels_BL.flatten(), None
    sources_T = None if sources_BL is None else sources_BL.flatten()
    if n_labels < len(labels_T):
        order_T = (labels_T == IGNORE).to(torch.uint8).argsort(stable=True)[:n_labels]
        x_TD, labels_T = x_TD[order_T], labels_T[order_T]
        sources_T = None if sources_T is None else sources_T[order_T]
    device = x_BLD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_vD.dtype
    graded = torch.is_grad_enabled()
    with torch.no_grad(), torch.autocast(device, enabled=False):
        total, dx_TD, dweight_vD = _in_turn(
            x_TD.to(dtype),
            weight_vD.detach().to(dtype),
            labels_T,
            sources_T,
            losses,
            chunk_tokens=chunk_tokens,
            scale=scale,
            of_x=graded and x_BLD.requires_grad,
            of_weight=graded and weight_vD.requires_grad,
        )
        if dx_TD is not None:
            if order_T is not None:
                dx_TD = dx_TD.new_zeros(labels_BL.numel(), dx_TD.shape[1]).index_copy_(0, order_T, dx_TD)
            dx_TD = dx_TD.view_as(x_BLD)
    if dx_TD is not None:
        total = WithGradient.apply(total, x_BLD, dx_TD)
    if dweight_vD is not None:  # a branch of its own: a backward in two passes asks for either alone
        total = total + WithGradient.apply(torch.zeros_like(total), weight_vD, dweight_vD)
    return total


def _in_turn(
    x_TD: Tensor,
    weight_vD: Tensor,
    labels_T: Tensor,
    sources_T: Tensor | None,
    losses: TokenLosses,
    *,
    chunk_tokens: int,
    scale: float,
    of_x: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum, and its gradients by the residual stream (T, D) and by the weight (v, D) in fp32 where asked for."""
    each = [x_TD.new_zeros(1, 1, dtype=torch.float32)]
    dx_TD = torch.empty_like(x_TD) if of_x else None
    dweight_vD = torch.zeros_like(weight_vD, dtype=torch.float32) if of_weight else None
    for first in range(0, len(labels_T), chunk_tokens):
        x_CD, labels_1C = x_TD[first : first + chunk_tokens], labels_T[first : first + chunk_tokens].unsqueeze(0)
        sources_1C = None if sources_T is None else sources_T[first : first + chunk_tokens].unsqueeze(0)
        logits_1Cv = F.linear(x_CD, weight_vD).float().unsqueeze(0)
        if dx_TD is None and dweight_vD is None:
            each.append(losses(logits_1Cv, labels_1C, sources_1C))
            continue
        with torch.enable_grad():
            of_chunk = losses(logits_1Cv.requires_grad_(), labels_1C, sources_1C)
            (gradient_1Cv,) = torch.autograd.grad((of_chunk * scale).sum(), logits_1Cv)
        each.append(of_chunk.detach())
        del logits_1Cv, of_chunk  # before the next product of their size
        gradient_Cv = gradient_1Cv.squeeze(0).to(weight_vD.dtype)
        if dx_TD is not None:
            torch.mm(gradient_Cv, weight_vD, out=dx_TD[first : first + chunk_tokens])
        if dweight_vD is None:
            continue
        if dweight_vD.dtype == gradient_Cv.dtype:
            torch.addmm(dweight_vD, gradient_Cv.t(), x_CD, out=dweight_vD)
        else:
            dweight_vD += gradient_Cv.t() @ x_CD
    return torch.cat(each, 1).sum() * scale, dx_TD, dweight_vD
