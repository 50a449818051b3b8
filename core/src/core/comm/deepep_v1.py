"""DeepEP V1: the transport over `deep_ep.Buffer`.

Written against commit 9af0e0d (v1.2.1) of github.com/deepseek-ai/DeepEP and the same class at dd758ca, by their text.
It has run against a strict imitation of that interface on CPUs; it has not run on several GPUs.
"""

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from core.comm.deepep_library import DeepEPLibrary, Sent, common_problems, width_problem
from core.comm.probe import library, version
from core.comm.transport import Sizes

IN_A_NODE = (2, 4, 8)
RANKS = (*IN_A_NODE, 16, 32, 64, 128, 144, 160)
"""What v1.2.1 has both kernels and a configuration for; above 8, nodes of 8."""


class BufferTransport(DeepEPLibrary):
    """Tokens over NVLink, and RDMA above 8 ranks.

    The number of SMs is the class's own and never changed: a handle is good for that number alone.
    """

    def __init__(self, group: ProcessGroup, sizes: Sizes) -> None:
        buffer, n = library().Buffer, group.size()
        row_bytes = sizes.dim * max(sizes.dtype.itemsize, 2)
        configs = (buffer.get_dispatch_config(n), buffer.get_combine_config(n))
        nvlink = max(config.get_nvl_buffer_size_hint(row_bytes, n) for config in configs)
        rdma = 0
        if n not in IN_A_NODE:  # a build without RDMA aborts when asked
            rdma = max(config.get_rdma_buffer_size_hint(row_bytes, n) for config in configs)
        dist.barrier(group)  # ranks that come late would run into the library's own limits of time
        self.buffer = buffer(group, num_nvl_bytes=nvlink, num_rdma_bytes=rdma, explicitly_destroy=True)
        self.description = f"DeepEP V1 (deep_ep {version()}), a buffer of {nvlink + rdma:,} bytes on each rank"

    def send(self, x_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor, n_experts: int) -> Sent:
        of_rank, of_node, of_expert, in_rank, _ = self.buffer.get_dispatch_layout(ids_TK, n_experts)
        rows_ND, local_NK, weight_NK, counts, handle, _ = self.buffer.dispatch(
            x_TD,
            topk_idx=ids_TK,
            topk_weights=weight_TK,
            num_tokens_per_rank=of_rank,
            num_tokens_per_rdma_rank=of_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=of_expert,
        )
        return Sent(rows_ND, local_NK, weight_NK, counts, list(handle))

    def send_again(self, x_TD: Tensor, handle: list[Any]) -> Tensor:
        return self.buffer.dispatch(x_TD, handle=tuple(handle))[0]

    def bring_back(self, rows_ND: Tensor, weight_NK: Tensor | None, handle: list[Any]) -> tuple[Tensor, Tensor | None]:
        x_TD, weight_TK, _ = self.buffer.combine(rows_ND, tuple(handle), topk_weights=weight_NK)
        return x_TD, weight_TK

    def close(self) -> None:
        self.buffer.destroy()


def problems(sizes: Sizes) -> Iterator[str]:
    """What keeps a run from this adapter."""
    yield from common_problems("DeepEP V1", sizes)
    inside = sizes.n_ranks in IN_A_NODE
    yield from width_problem("DeepEP V1", sizes.dim, 128 if inside else 256, "deepep_v2 or hybridep")
    if inside and sizes.dim > 8176:
        yield f"DeepEP V1 within a node carries widths up to 8176, and model.dim is {sizes.dim}: use deepep_v2"
    if sizes.n_ranks not in RANKS:
        fits = ", ".join(map(str, RANKS))
        yield f"DeepEP V1 has no kernels for expert_parallel_degree {sizes.n_ranks}: use {fits}, or deepep_v2"
    if (n_here := sizes.n_experts // sizes.n_ranks) > 128:
        yield f"DeepEP V1 has room for 128 experts on a rank, and {n_here} live there: raise expert_parallel_degree"
