"""How tokens reach their experts and come back: the contract, and the way when all experts live here.

Letters: T tokens, K choices of a token, R = T K rows for experts (of which some ranks may hold more, some fewer),
D width, G experts that live here.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from core.activation_checkpoint.region import kept
from core.nn.module import cpu_forms, inference_forms


class Rows(NamedTuple):
    """What arrives at the experts that live here: rows sorted by expert, their weights, how many each expert gets.

    `back` is whatever the dispatcher needs to return them.
    """

    x_RD: Tensor
    weight_R: Tensor
    counts_G: Tensor
    back: Any


class Dispatcher(Protocol):
    """Takes tokens to the experts that they chose, and sums what these answer.

    `combine` is the transpose of `dispatch`, and the backward of each is the other.
    """

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor, n_experts: int) -> Rows:
        """One row per token and choice, sorted by expert."""

    def combine(self, y_RD: Tensor, back: Any) -> Tensor:
        """For each token the sum (T, D) of its rows, in the type of `y_RD`."""


class Local:
    """All experts live here: tokens are sorted, and sorted back."""

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor, n_experts: int) -> Rows:
        if len(x_TD) == 1 and (forms := inference_forms(x_TD)):
            return Rows(*forms.rows_of_one_token(x_TD, ids_TK, weight_TK, n_experts))
        with kept():
            order_R = ids_TK.flatten().argsort(stable=True)
            place_R = torch.empty_like(order_R).scatter(0, order_R, torch.arange(len(order_R), device=order_R.device))
            token_R = order_R // ids_TK.shape[1]
            counts_G = count(ids_TK, n_experts)
        back = token_R, place_R.view_as(ids_TK)
        x_RD = x_TD.index_select(0, token_R) if inference_forms(x_TD) else _Spread.apply(x_TD, *back)
        return Rows(x_RD, weight_TK.flatten().index_select(0, order_R), counts_G, back)

    def combine(self, y_RD: Tensor, back: tuple[Tensor, Tensor]) -> Tensor:
        """As `Dispatcher.combine`; `back` is the token of each row (R,) and the rows of each token (T, K)."""
        return _sum_of_choices(y_RD, back[1]) if inference_forms(y_RD) else _Gather.apply(y_RD, *back)


def count(ids: Tensor, n: int) -> Tensor:
    """How often each of 0 .. n - 1 stands in `ids`, of any shape: (n,) int64, without waiting for a device."""
    flat = ids.flatten()
    return torch.zeros(n, dtype=torch.int64, device=ids.device).scatter_add(0, flat, torch.ones_like(flat))


class _Spread(torch.autograd.Function):
    """A row for each choice of a token. Forward and backward only read rows in order: no atomic additions."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, token_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return x_TD.index_select(0, token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyrefly: ignore[bad-override] - the decorator is untyped
        return _sum_of_choices(grads[0], *ctx.saved_tensors), None, None


class _Gather(torch.autograd.Function):
    """The sum over the rows of each token's choices."""

    @staticmethod
    def forward(ctx: FunctionCtx, y_RD: Tensor, token_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_R)
        return _sum_of_choices(y_RD, place_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyrefly: ignore[bad-override] - the decorator is untyped
        return grads[0].index_select(0, *ctx.saved_tensors), None, None


def _sum_of_choices(rows_RD: Tensor, place_TK: Tensor) -> Tensor:
    if cpu_forms(rows_RD) and rows_RD.itemsize >= 4:  # one pass, which in 16 bits rounds half away from 0
        return F.embedding_bag(place_TK, rows_RD, mode="sum")
    return rows_RD.index_select(0, place_TK.flatten()).unflatten(0, place_TK.shape).sum(1)
