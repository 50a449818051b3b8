"""The meaning of the operations, written with PyTorch's own collectives: runs on any device, and is what the CPU has.

Letters: T tokens, K choices of a token, D width, E experts, G of which live here, R ranks, S rows sent, N rows that
arrive, M pairs of such a row and an expert that lives here, P rows with pads.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from core.comm.transport import Handle
from core.nn.dispatch import count


class Reference:
    """DeepEP's operations; rows are in the order of (source rank, token), and sums in that of ranks.

    A handle is the tokens sent (S,), by receiver, and how many rows go to and come from each rank (2, R) on the host.
    """

    namespace = "deepep"

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor, n_experts: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Handle]:
        assert n_experts % self.size == 0, f"{n_experts} experts on {self.size} ranks"
        n_here = n_experts // self.size
        rank_R11 = torch.arange(self.size, device=x_TD.device).view(-1, 1, 1)
        goes_RT = (ids_TK // n_here == rank_R11).any(2)
        send_R = goes_RT.sum(1)
        receive_R = self._travel(send_R, [1] * self.size, [1] * self.size)
        handle = [goes_RT.nonzero()[:, 1].clone(), torch.stack((send_R, receive_R)).cpu()]
        n_rows = int(handle[1][1].sum())
        local_NK = self.dispatch_cached(ids_TK, handle, n_rows) - self.rank * n_here
        here_NK = (local_NK >= 0) & (local_NK < n_here)
        return (
            self.dispatch_cached(x_TD, handle, n_rows),
            local_NK.where(here_NK, -1),
            self.dispatch_cached(weight_TK, handle, n_rows).where(here_NK, 0),
            count(local_NK[here_NK], n_here),
            handle,
        )

    def dispatch_cached(self, x_TD: Tensor, handle: Handle, n_rows: int) -> Tensor:
        token_S, splits_2R = handle
        send, receive = splits_2R.tolist()
        return self._travel(x_TD.index_select(0, token_S), receive, send)

    def combine(self, rows: Tensor, handle: Handle, n_tokens: int) -> Tensor:
        token_S, splits_2R = handle
        send, receive = splits_2R.tolist()
        home = self._travel(rows, send, receive)
        total = wide_zeros(rows, n_tokens)
        for token, part in zip(token_S.split(send), home.split(send), strict=True):  # a rank has a token at most once
            total.index_add_(0, token, part.to(total.dtype))
        return total.to(rows.dtype)

    def combine_weights(
        self, rows_ND: Tensor, weight_NK: Tensor, handle: Handle, n_tokens: int
    ) -> tuple[Tensor, Tensor]:
        return self.combine(rows_ND, handle, n_tokens), self.combine(weight_NK, handle, n_tokens)

    def fake_handle(self, x_TD: Tensor, ids_TK: Tensor, n_experts: int, n_rows: int) -> Handle:
        n_sent = torch.library.get_ctx().new_dynamic_size()
        return [ids_TK.new_empty(n_sent), ids_TK.new_empty(2, self.size, device="cpu")]

    def _travel(self, x: Tensor, receive: list[int], send: list[int]) -> Tensor:
        arrived = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(arrived, x.contiguous(), receive, send, group=self.group)
        return arrived


class HybridReference:
    """HybridEP's operations: the same journey, then a row for each pair, sorted by expert, groups filled up with zeros.

    A handle is that of `Reference` and, for each pair that found room, its row among those that arrived, which choice
    of the row it is, and its place (each (M,)).
    """

    namespace = "hybridep"

    def __init__(self, group: ProcessGroup) -> None:
        self.journey = Reference(group)

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor, n_experts: int, capacity: int | None, pad_multiple: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Handle]:
        assert (capacity or 0) % pad_multiple == 0, f"capacity {capacity} is no multiple of {pad_multiple}"
        x_ND, local_NK, weight_NK, counts_G, sent = self.journey.dispatch(x_TD, ids_TK, weight_TK, n_experts)
        pairs_M2 = (local_NK >= 0).nonzero()
        expert_M = local_NK[local_NK >= 0]
        order_M = expert_M.argsort(stable=True)
        (row_M, choice_M), expert_M = pairs_M2[order_M].T.contiguous(), expert_M[order_M]
        padded_G = -(-counts_G // pad_multiple) * pad_multiple
        ends_G = padded_G.cumsum(0)
        number_M = torch.arange(len(order_M), device=x_TD.device) - (counts_G.cumsum(0) - counts_G)[expert_M]
        place_M = (ends_G - padded_G)[expert_M] + number_M
        n_needed = int(padded_G.sum())
        n_rows = n_needed if capacity is None else capacity
        fits_M = place_M < n_rows
        handle = [*sent, row_M[fits_M], choice_M[fits_M], place_M[fits_M]]
        *_, row_M, choice_M, place_M = handle
        return (
            x_ND.new_zeros(n_rows, x_ND.shape[1]).index_copy_(0, place_M, x_ND[row_M]),
            weight_NK.new_zeros(n_rows).index_copy_(0, place_M, weight_NK[row_M, choice_M]),
            ends_G.clamp(max=n_rows) - (ends_G - padded_G).clamp(max=n_rows),
            torch.tensor([n_needed > n_rows], dtype=torch.int32, device=x_TD.device),
            handle,
        )

    def dispatch_cached(self, x_TD: Tensor, handle: Handle, n_rows: int) -> Tensor:
        *sent, row_M, _, place_M = handle
        x_ND = self.journey.dispatch_cached(x_TD, sent, n_arrived(sent))
        return x_ND.new_zeros(n_rows, x_ND.shape[1]).index_copy_(0, place_M, x_ND[row_M])

    def combine(self, rows: Tensor, handle: Handle, n_tokens: int) -> Tensor:
        *sent, row_M, _, place_M = handle
        total_ND = wide_zeros(rows, n_arrived(sent))
        total_ND.index_add_(0, row_M, rows[place_M].to(total_ND.dtype))
        return self.journey.combine(total_ND.to(rows.dtype), sent, n_tokens)

    def combine_weights(
        self, rows_PD: Tensor, weight_P: Tensor, ids_TK: Tensor, handle: Handle
    ) -> tuple[Tensor, Tensor]:
        *sent, row_M, choice_M, place_M = handle
        weight_NK = weight_P.new_zeros(n_arrived(sent), ids_TK.shape[1])
        weight_NK[row_M, choice_M] = weight_P[place_M]
        n_tokens = ids_TK.shape[0]
        return self.combine(rows_PD, handle, n_tokens), self.journey.combine(weight_NK, sent, n_tokens)

    def fake_handle(self, x_TD: Tensor, ids_TK: Tensor, n_experts: int, n_rows: int) -> Handle:
        n_pairs = torch.library.get_ctx().new_dynamic_size()
        sent = self.journey.fake_handle(x_TD, ids_TK, n_experts, n_rows)
        return [*sent, *(ids_TK.new_empty(n_pairs) for _ in range(3))]


def n_arrived(sent: Handle) -> int:
    """How many rows came with a dispatch of `Reference`."""
    return int(sent[1][1].sum())


def wide_zeros(rows: Tensor, n: int) -> Tensor:
    """Zeros (n, D) to sum `rows` (R, D) up in: fp32 at least."""
    return rows.new_zeros(n, *rows.shape[1:], dtype=torch.promote_types(rows.dtype, torch.float32))
