"""Expert parallelism over `deepep::dispatch` and `deepep::combine`.

Letters: T tokens, K choices of a token, N rows that arrive (a token once per rank), R pairs of such a row and an expert
that lives here, D width, E experts, G of which live here.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from core.activation_checkpoint.region import kept
from core.comm.ops import DEEPEP_COMBINE, DEEPEP_DISPATCH
from core.comm.reference import wide_zeros
from core.nn.dispatch import Rows


class DeepEP:
    """A token travels to a rank once; there it is copied for each of its experts, and their answers are summed.

    Choices of -1 are no choices. What comes home has the type of what was sent, its sums are formed in fp32.
    The order of rows may be another one in each dispatch, a repeated one for backward included: nothing that depends
    on it may be kept apart from the rows.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group.group_name

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor, n_experts: int) -> Rows:
        x_ND, local_NK, weight_NK, counts_G, handle = DEEPEP_DISPATCH(x_TD, ids_TK, weight_TK, n_experts, self.group)
        with kept():
            n_pairs = int(counts_G.sum().item())
        local = local_NK.flatten()
        pair_R = torch.where(local < 0, counts_G.shape[0], local).argsort(stable=True)[:n_pairs]
        row_R = pair_R // local_NK.shape[1]
        weight_R = weight_NK.flatten().index_select(0, pair_R)
        back = x_TD.shape[0], x_TD.dtype, x_ND.shape[0], row_R, handle
        return Rows(_Copies.apply(x_ND, row_R), weight_R, counts_G, back)

    def combine(self, y_RD: Tensor, back: Any) -> Tensor:
        n_tokens, dtype, n_rows, row_R, handle = back
        return DEEPEP_COMBINE(_Sums.apply(y_RD, row_R, n_rows, dtype), handle, n_tokens, self.group)


class _Copies(torch.autograd.Function):
    """A copy of a row for each of its experts."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, row_R: Tensor) -> Tensor:
        ctx.save_for_backward(row_R)
        ctx.n_rows = x_ND.shape[0]
        return x_ND.index_select(0, row_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyrefly: ignore[bad-override] - the decorator is untyped
        (row_R,) = ctx.saved_tensors
        return sums(grads[0], row_R, ctx.n_rows, grads[0].dtype), None


class _Sums(torch.autograd.Function):
    """The sum over the copies of each row, in `dtype`."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, row_R: Tensor, n_rows: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(row_R)
        ctx.dtype = y_RD.dtype
        return sums(y_RD, row_R, n_rows, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyrefly: ignore[bad-override] - the decorator is untyped
        (row_R,) = ctx.saved_tensors
        return grads[0].index_select(0, row_R).to(ctx.dtype), None, None, None


def sums(y_RD: Tensor, row_R: Tensor, n_rows: int, dtype: torch.dtype) -> Tensor:
    """For each row the sum of its copies, formed in fp32 at least."""
    total_ND = wide_zeros(y_RD, n_rows)
    return total_ND.index_add_(0, row_R, y_RD.to(total_ND.dtype)).to(dtype)
