"""What carries tokens between the ranks of a group: the two contracts, and which transport a group is bound to.

Rank r of R keeps experts r G .. (r + 1) G - 1. In forward and backward, whatever the counts, a call is a collective:
all ranks of the group make it. Nothing that comes in is changed. What goes out is ready on the current stream, and no
view of something larger: torch.compile relies on its alignment. Handles are tensors, and all that is remembered of a
dispatch: calls may interleave.

Letters: T tokens, K choices of a token, D width, E experts, G of which live here, N rows that arrive, P rows with pads.
"""

import sys
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group

Handle = list[Tensor]


class Sizes(NamedTuple):
    """The largest dispatch of a run, for which buffers are made: the same on all ranks of a group."""

    n_tokens: int
    """Of a rank."""
    dim: int
    n_experts: int
    top_k: int
    n_ranks: int
    dtype: torch.dtype
    """Of the rows."""


class Transport(Protocol):
    """What both contracts have in common."""

    namespace: str
    """Of the operations that it answers: deepep or hybridep."""

    def dispatch_cached(self, x_TD: Tensor, handle: Handle, n_rows: int) -> Tensor:
        """The rows (`n_rows`) of `x_TD` that the dispatch of this handle would have given, in its order."""
        ...

    def combine(self, rows: Tensor, handle: Handle, n_tokens: int) -> Tensor:
        """For each token the sum (T, D) of its rows: the transpose of `dispatch_cached`.

        Sums are formed in fp32 at least, and given in the type of `rows`.
        """
        ...


class DeepEPTransport(Transport, Protocol):
    """Brings a token to a rank once, however many of its experts live there; rows come in any order."""

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor, n_experts: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Handle]:
        """Rows (N, D), their experts (N, K) numbered from 0 on each rank, weights (N, K), counts (G,), handle.

        `ids_TK` is int64, -1 for no expert; a choice that does not live here arrives as -1 with weight 0.
        `weight_TK` is fp32, `counts` int64: how many choices each expert got.
        """
        ...

    def combine_weights(
        self, rows_ND: Tensor, weight_NK: Tensor, handle: Handle, n_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """`combine` of rows and of weights, the latter (T, K) in fp32."""
        ...

    def fake_handle(self, x_TD: Tensor, ids_TK: Tensor, n_experts: int, n_rows: int) -> Handle:
        """Tensors like those of a handle, without their numbers; sizes that numbers decide are those of
        `torch.library.get_ctx().new_dynamic_size()`."""
        ...


class HybridEPTransport(Transport, Protocol):
    """Brings a row for each choice that lives here, sorted by expert, each expert's rows filled up with zeros."""

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor, n_experts: int, capacity: int | None, pad_multiple: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Handle]:
        """Rows (P, D), weights (P,), counts (G,) with the pads, overflow (1,) int32, handle.

        With a `capacity`, a multiple of `pad_multiple`, P is that: rows beyond are dropped, `overflow` is 1, and what
        is left free is zero.
        """
        ...

    def combine_weights(
        self, rows_PD: Tensor, weight_P: Tensor, ids_TK: Tensor, handle: Handle
    ) -> tuple[Tensor, Tensor]:
        """`combine` of rows, and the weight (T, K) of each choice that has a row, in fp32; 0 for the others."""
        ...

    def fake_handle(self, x_TD: Tensor, ids_TK: Tensor, n_experts: int, n_rows: int) -> Handle:
        """As DeepEPTransport's."""
        ...


_BOUND: dict[tuple[str, str], Transport] = {}


def bind(group: ProcessGroup, transport: Transport) -> None:
    """Let the operations of the transport's namespace use it for `group`; all ranks of the group bind alike."""
    _BOUND[transport.namespace, group.group_name] = transport


def release() -> None:
    """Let go of all that is bound, before the process groups end; called by all ranks.

    A transport with a method `close` is closed, which all ranks of its group do together: not after an error, when some
    may not come.
    """
    transports = list(_BOUND.values())
    _BOUND.clear()
    for transport in transports if sys.exc_info()[0] is None else ():
        if (close := getattr(transport, "close", None)) is not None:
            close()


def bound(namespace: str, group_name: str) -> Transport | None:
    """What was bound to a group for this namespace."""
    return _BOUND.get((namespace, group_name))


def find_group(name: str) -> ProcessGroup:
    """The process group of a name: names travel through traced graphs, groups do not."""
    return _resolve_process_group(cast(Any, name))


def unbound(namespace: str, group_name: str, device: torch.device) -> RuntimeError:
    """The error of an operation that has nothing to run on."""
    return RuntimeError(
        f"{namespace} on {device.type}: nothing carries the tokens of process group {group_name}. "
        f"core.comm.backend.dispatchers binds what parallelism.expert_parallel_comm_backend asks for"
    )
