"""HybridEP: the transport over `deep_ep.HybridEPBuffer`, whose handle has 9 or, since 17cfb81, 11 members.

Written against commit 94a9f8f of github.com/deepseek-ai/DeepEP, branch hybrid-ep, and its state of early 2026, by their
text. It has run against a strict imitation of that interface on CPUs; it has not run on several GPUs.

Letters: T tokens, K choices of a token, D width, E experts, G of which live here, P rows with pads.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from core.comm.deepep_library import common_problems, width_problem
from core.comm.packing import fake_pack, pack_handle, unpack_handle
from core.comm.probe import library, version
from core.comm.transport import Handle, Sizes
from core.config.errors import UserError

CHUNK_TOKENS = 64  # tokens that the kernels take at once, unless NUM_OF_TOKENS_PER_CHUNK_*_API say another number


class HybridEPBufferTransport:
    """Rows sorted by expert, over NVLink and what joins its domains.

    All ranks send equally many tokens, the number that buffers were made for. Calls on one buffer must not overlap, and
    do not: each is on the current stream. Packed with the library's handle are its rows' multiple, whether it waits,
    and how many rows were filled.
    """

    namespace = "hybridep"

    def __init__(self, group: ProcessGroup, sizes: Sizes) -> None:
        self.sizes = sizes
        self.settings: Any = None
        """The library's settings of a dispatch, a member of its handles that is no tensor: all have the same."""
        dist.barrier(group)  # ranks that come late would run into the library's own limits of time
        self.buffer = library().HybridEPBuffer(
            group,
            hidden_dim=sizes.dim,
            max_num_of_tokens_per_rank=sizes.n_tokens,
            num_local_experts=sizes.n_experts // sizes.n_ranks,
            enable_custom_allgather=False,  # gave wrong counts where it was on
        )
        self.description = f"HybridEP (deep_ep {version()}), buffers for {sizes.n_tokens:,} tokens on each rank"

    def close(self) -> None:
        """Let the buffer go: the library frees it with the last reference."""
        del self.buffer

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor, n_experts: int, capacity: int | None, pad_multiple: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Handle]:
        n_tokens = x_TD.shape[0]
        if n_tokens != self.sizes.n_tokens:
            raise UserError(
                f"HybridEP wants equally many tokens on all ranks: its buffers are for {self.sizes.n_tokens}, and "
                f"{n_tokens} came"
            )
        map_TE, weight_TE = expert_choices(ids_TK, weight_TK, n_experts)
        waits = capacity is None
        rows_PD, weight_P, _, counts_G, handle = self.buffer.dispatch_with_permute(
            hidden=x_TD,
            routing_map=map_TE,
            probs=weight_TE,
            num_permuted_tokens=capacity,
            pad_multiple=multiple(pad_multiple),
            non_blocking=not waits,
        )
        *members, overflow = handle
        counts_G = counts_G.to(x_TD.device, torch.int64)
        if capacity is not None:
            counts_G = counts_G.cumsum(0).clamp(max=capacity).diff(prepend=counts_G.new_zeros(1))
        filled = counts_G.sum()
        rows_PD, weight_P = cleared(rows_PD, filled, waits), cleared(weight_P, filled, waits)
        told = overflow.new_zeros(1) if waits else overflow.clone()
        packed = pack_handle([pad_multiple, waits, filled, overflow, *self._kept(members)], x_TD.device)
        return rows_PD, weight_P, counts_G, told, packed

    def dispatch_cached(self, x_TD: Tensor, handle: Handle, n_rows: int) -> Tensor:
        pad_multiple, waits, filled, members = self._opened(handle)
        rows_PD, *_ = self.buffer.dispatch_with_permute(
            hidden=x_TD,
            handle=members,
            num_permuted_tokens=n_rows,
            pad_multiple=multiple(pad_multiple),
            non_blocking=not waits,
        )
        return cleared(rows_PD, filled, waits)

    def combine(self, rows: Tensor, handle: Handle, n_tokens: int) -> Tensor:
        """For each of `n_tokens` tokens the sum (T, D) of its `rows` (R, D), which come back from all ranks."""
        pad_multiple, _, _, members = self._opened(handle)
        return self.buffer.combine_with_unpermute(hidden=rows, handle=members, pad_multiple=multiple(pad_multiple))[0]

    def combine_weights(
        self, rows_PD: Tensor, weight_P: Tensor, ids_TK: Tensor, handle: Handle
    ) -> tuple[Tensor, Tensor]:
        pad_multiple, _, _, members = self._opened(handle)
        x_TD, weight_TE = self.buffer.combine_with_unpermute(
            hidden=rows_PD, probs=weight_P, handle=members, pad_multiple=multiple(pad_multiple)
        )
        return x_TD, weight_TE.gather(1, ids_TK.clamp(min=0)).masked_fill(ids_TK < 0, 0)

    def fake_handle(self, x_TD: Tensor, ids_TK: Tensor, n_experts: int, n_rows: int) -> Handle:
        return fake_pack(x_TD)

    def _kept(self, members: list[Any]) -> Iterator[Any]:
        """Members of a handle, an empty list in the place of the settings."""
        for member in members:
            if member is None or isinstance(member, int | Tensor):
                yield member
            else:
                self.settings = member
                yield []

    def _opened(self, packed: Handle) -> tuple[int, bool, Tensor, tuple[Any, ...]]:
        """The multiple of rows, whether the dispatch waits, how many rows are filled, and the library's handle."""
        pad_multiple, waits, filled, overflow, *members = unpack_handle(packed)
        members = [self.settings if isinstance(part, list) else part for part in members]
        return pad_multiple, waits, filled, (*members, overflow)


def multiple(pad_multiple: int) -> int | None:
    """As the library has it: None where rows are not padded."""
    return None if pad_multiple == 1 else pad_multiple


def expert_choices(ids_TK: Tensor, weight_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """Which experts each token chose (T, E) and their weights, 0 elsewhere; ids of -1 choose none.

    The library makes such maps too, and reads ids of -1 as places outside of them.
    """
    last_TK = ids_TK.where(ids_TK >= 0, n_experts)
    map_TF = weight_TK.new_zeros(len(ids_TK), n_experts + 1, dtype=torch.bool).scatter(1, last_TK, True)
    weight_TF = weight_TK.new_zeros(len(ids_TK), n_experts + 1).scatter(1, last_TK, weight_TK)
    return map_TF[:, :-1].contiguous(), weight_TF[:, :-1].contiguous()


def cleared(rows: Tensor, filled: Tensor, waits: bool) -> Tensor:
    """`rows` (R, D) with zeros behind those filled, which a dispatch that does not wait leaves as they were."""
    if waits:
        return rows
    free = torch.arange(rows.shape[0], device=rows.device) >= filled
    return rows.masked_fill_(free.view(-1, *[1] * (rows.dim() - 1)), 0)


def problems(sizes: Sizes) -> Iterator[str]:
    """What keeps a run from this adapter; for ranks of one NVLink domain, as the others show at run time only."""
    yield from common_problems("HybridEP", sizes)
    yield from width_problem("HybridEP", sizes.dim, 16, "standard")
    if sizes.n_experts % 4:
        yield f"HybridEP wants a multiple of 4 experts, and there are {sizes.n_experts}: use standard"
    if sizes.n_tokens % CHUNK_TOKENS * sizes.n_ranks % 4:
        step = next(n for n in (1, 2, 4) if n * sizes.n_ranks % 4 == 0)
        yield (
            f"HybridEP wants local_batch_size x seq_len / ranks that share a row, {sizes.n_tokens}, to be a multiple "
            f"of {step} for expert_parallel_degree {sizes.n_ranks}: change training.seq_len"
        )
