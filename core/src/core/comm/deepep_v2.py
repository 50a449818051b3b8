"""DeepEP V2: the transport over `deep_ep.ElasticBuffer`, versions 2.0 and 2.1.

Written against commit dd758ca of github.com/deepseek-ai/DeepEP (2.1.0) and what 2.0.0 had different, by their text.
It has run against a strict imitation of that interface on CPUs; it has not run on several GPUs.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from core.comm.deepep_library import DeepEPLibrary, Sent, common_problems, width_problem
from core.comm.probe import library, version
from core.comm.transport import Sizes

MANY_SMS = 20  # where the library cannot work out a number: it divides by a bandwidth that it may read as 0


class ElasticBufferTransport(DeepEPLibrary):
    """Tokens over NCCL's own device-side communication.

    Rows come in any order, in that of ranks and tokens when PyTorch is asked to be deterministic. The library's handle
    is an object whose constructor changes between versions: it is taken apart and put together by its attributes.
    """

    def __init__(self, group: ProcessGroup, sizes: Sizes) -> None:
        self.sizes, self.names = sizes, ()
        dist.barrier(group)  # the library takes over NCCL's communicator, which is made by the first collective
        self.buffer = library().ElasticBuffer(
            group,
            num_max_tokens_per_rank=sizes.n_tokens,
            hidden=sizes.dim,
            num_topk=sizes.top_k,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            explicitly_destroy=True,
        )
        try:
            self.n_sms = self.buffer.get_theoretical_num_sms(sizes.n_experts, sizes.top_k)
        except ZeroDivisionError:
            self.n_sms = MANY_SMS
        n_bytes = self.buffer.num_bytes
        self.description = f"DeepEP V2 (deep_ep {version()}), a buffer of {n_bytes:,} bytes on each rank"

    def send(self, x_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor, n_experts: int) -> Sent:
        rows_ND, local_NK, weight_NK, handle, _ = self.buffer.dispatch(
            x_TD,
            topk_idx=ids_TK.to(library().topk_idx_t),
            topk_weights=weight_TK,
            num_experts=n_experts,
            num_max_tokens_per_rank=self.sizes.n_tokens,
            expert_alignment=1,
            num_sms=self.n_sms,
        )
        self.names = tuple(vars(handle))
        counts = handle.num_recv_tokens_per_expert_list
        return Sent(rows_ND, local_NK, weight_NK, counts, list(vars(handle).values()))

    def send_again(self, x_TD: Tensor, handle: list[Any]) -> Tensor:
        whole = self._whole(handle)
        return self.buffer.dispatch(x_TD, handle=whole, num_sms=whole.num_sms)[0]  # 0 fails with a handle (issue 685)

    def bring_back(self, rows_ND: Tensor, weight_NK: Tensor | None, handle: list[Any]) -> tuple[Tensor, Tensor | None]:
        x_TD, weight_TK, _ = self.buffer.combine(rows_ND, self._whole(handle), topk_weights=weight_NK)
        return x_TD, weight_TK

    def close(self) -> None:
        self.buffer.destroy()

    def _whole(self, members: list[Any]) -> Any:
        handle = library().EPHandle.__new__(library().EPHandle)
        vars(handle).update(zip(self.names, members, strict=True))
        return handle


def problems(sizes: Sizes) -> Iterator[str]:
    """What keeps a run from this adapter."""
    yield from common_problems("DeepEP V2", sizes)
    yield from width_problem("DeepEP V2", sizes.dim, 8, "standard")
