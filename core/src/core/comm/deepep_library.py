"""What the adapters of DeepEP's two generations have in common.

Letters: T tokens, K choices of a token, D width, G experts that live here, N rows that arrive.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from core.comm.packing import fake_pack, pack_handle, unpack_handle
from core.comm.transport import Handle, Sizes


class Sent(NamedTuple):
    """What the library's dispatch returns: rows, their local experts and weights, rows of each expert, its handle."""

    rows_ND: Tensor
    local_NK: Tensor
    weight_NK: Tensor
    counts: list[int]
    handle: list[Any]


class DeepEPLibrary(ABC):
    """Tokens carried by a buffer of the library, under the contract of `core.comm.transport.DeepEPTransport`.

    Every call waits on the current stream for the library's own, so results are ready when it returns. A rank without
    tokens sends a row of zeros that nobody chose, as the kernels want at least one. What is remembered of a dispatch is
    in its handle, packed, and what the library writes into that it writes into a copy.
    """

    namespace = "deepep"
    description: str
    """Of what runs, for the log."""

    @abstractmethod
    def __init__(self, group: ProcessGroup, sizes: Sizes) -> None:
        """Make the buffer; all ranks of the group do so together."""

    @abstractmethod
    def send(self, x_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor, n_experts: int) -> Sent:
        """A dispatch of at least one token."""

    @abstractmethod
    def send_again(self, x_TD: Tensor, handle: list[Any]) -> Tensor:
        """A dispatch by the handle of an earlier one."""

    @abstractmethod
    def bring_back(self, rows_ND: Tensor, weight_NK: Tensor | None, handle: list[Any]) -> tuple[Tensor, Tensor | None]:
        """Sums of rows and, where given, of weights for each token."""

    @abstractmethod
    def close(self) -> None:
        """Free the buffer; all ranks of the group do so together."""

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor, n_experts: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Handle]:
        if x_TD.shape[0] == 0:
            ids_TK, weight_TK = ids_TK.new_full((1, ids_TK.shape[1]), -1), one_row(weight_TK)
        rows_ND, local_NK, weight_NK, counts, handle = self.send(one_row(x_TD), ids_TK, weight_TK, n_experts)
        local_NK = local_NK.to(ids_TK.dtype)
        counts_G = torch.tensor(counts, dtype=torch.int64, device=x_TD.device)
        return rows_ND, local_NK, weight_NK.masked_fill(local_NK < 0, 0), counts_G, pack_handle(handle, x_TD.device)

    def dispatch_cached(self, x_TD: Tensor, handle: Handle, n_rows: int) -> Tensor:
        rows_ND = self.send_again(one_row(x_TD), unpack_handle(handle))
        return rows_ND if rows_ND.shape[0] == n_rows else rows_ND[:n_rows].clone()  # without a tail nobody wrote

    def combine(self, rows: Tensor, handle: Handle, n_tokens: int) -> Tensor:
        """For each of `n_tokens` tokens the sum (T, D) of its `rows` (R, D), which come back from all ranks."""
        x_TD, _ = self.bring_back(rows, None, unpack_handle(handle))
        return x_TD if n_tokens else x_TD.new_empty(0, x_TD.shape[1])

    def combine_weights(
        self, rows_ND: Tensor, weight_NK: Tensor, handle: Handle, n_tokens: int
    ) -> tuple[Tensor, Tensor]:
        x_TD, weight_TK = self.bring_back(rows_ND, weight_NK, unpack_handle(handle))
        assert weight_TK is not None
        if n_tokens:
            return x_TD, weight_TK
        return x_TD.new_empty(0, x_TD.shape[1]), weight_TK.new_empty(0, weight_TK.shape[1])

    def fake_handle(self, x_TD: Tensor, ids_TK: Tensor, n_experts: int, n_rows: int) -> Handle:
        return fake_pack(x_TD)


def one_row(x: Tensor) -> Tensor:
    """`x` (R, D), or a row (1, D) of zeros where it has none."""
    return x if x.shape[0] else x.new_zeros(1, *x.shape[1:])


def common_problems(name: str, sizes: Sizes) -> Iterator[str]:
    """What all of DeepEP's libraries want of a run."""
    if sizes.dtype != torch.bfloat16:
        dtype = str(sizes.dtype).removeprefix("torch.")
        yield (
            f"{name} carries bfloat16, and training.mixed_precision_param makes tokens {dtype}: set it to bfloat16, or "
            "use standard"
        )
    if sizes.top_k > 32:
        yield f"{name} knows at most 32 experts per token, and top_k is {sizes.top_k}: use standard"


def width_problem(name: str, dim: int, multiple: int, others: str) -> Iterator[str]:
    """A width that is no multiple of what the kernels want."""
    if dim % multiple:
        yield (
            f"{name} wants a width that is a multiple of {multiple}, and model.dim is {dim}: use {others}, or pad the "
            f"model's width to {-(-dim // multiple) * multiple}"
        )
