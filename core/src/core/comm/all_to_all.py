"""Expert parallelism over the collectives that every backend has.

Letters: T tokens, K choices of a token, R = T K rows sent, Q rows received, D width, E experts, G of which live here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as functional

from core.activation_checkpoint.region import kept
from core.nn.dispatch import Local, Rows


def read_splits(splits_2N: Tensor, n_rows: int) -> list[list[int]]:
    """How many of `n_rows` rows go to each of N ranks, and how many come from each, (2, N), as the device counted."""
    del n_rows
    return splits_2N.tolist()


class AllToAll:
    """Rank r keeps experts r G .. (r + 1) G - 1: rows are sorted by expert, sent in one all-to-all, sorted again.

    The host asks `splits` how many rows go where, once per layer.
    """

    def __init__(self, group: ProcessGroup, splits: Callable[[Tensor, int], list[list[int]]] = read_splits) -> None:
        self.group, self.size, self.splits = group, group.size(), splits
        self.local = Local()

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor, n_experts: int) -> Rows:
        rows = self.local.dispatch(x_TD, ids_TK, weight_TK, n_experts)
        n_here = n_experts // self.size
        with kept(), torch.no_grad():
            theirs_E = functional.wait_tensor(functional.all_to_all_single(rows.counts_G, None, None, self.group))
            counts_RG = theirs_E.view(self.size, n_here)
            splits_2N = torch.stack((rows.counts_G.view(self.size, n_here).sum(1), counts_RG.sum(1)))
            splits = self.splits(splits_2N, len(rows.x_RD))
            expert_Q = torch.arange(n_here, device=x_TD.device).repeat(self.size)
            expert_Q = expert_Q.repeat_interleave(theirs_E, output_size=sum(splits[1]))
            order_Q = expert_Q.argsort(stable=True)
            place_Q = torch.empty_like(order_Q).scatter(0, order_Q, torch.arange(len(order_Q), device=x_TD.device))
            counts_G = counts_RG.sum(0)
        send, receive = splits
        x_QD = self._travel(rows.x_RD, receive, send).index_select(0, order_Q)
        weight_Q = self._travel(rows.weight_R, receive, send).index_select(0, order_Q)
        return Rows(x_QD, weight_Q, counts_G, (rows.back, place_Q, send, receive))

    def combine(self, y_RD: Tensor, back: Any) -> Tensor:
        home, place_Q, send, receive = back
        return self.local.combine(self._travel(y_RD.index_select(0, place_Q), send, receive), home)

    def _travel(self, x: Tensor, receive: list[int], send: list[int]) -> Tensor:
        return functional.wait_tensor(functional.all_to_all_single(x, receive, send, self.group))
