"""Context parallelism: the tokens of a row lie on several ranks, and attention sees all of them.

Letters: B rows, L length here, M length of the whole row, N query heads, K key/value heads, H head width.
"""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh

from core.data.packing import Batch, count_labels
from core.nn.decoder import Block
from core.nn.kernel import Kernel, KeyValues, Mask, Positions
from core.parallel.pipeline import Microbatch
from core.parallel.tensor import gather_tokens
from core.runtime.device import to_device


def order(length: int, n_ranks: int, *, balanced: bool) -> Tensor:
    """Places of a row, rank after rank (n_ranks, length / n_ranks).

    Balanced, rank r has pieces r and 2 n - 1 - r of 2 n, so that all ranks have equally many visible keys:

        rank    0 1 1 0     of two
    """
    if not balanced:
        return torch.arange(length).view(n_ranks, -1)
    piece = torch.arange(length).view(2 * n_ranks, -1)
    return torch.stack([torch.cat((piece[r], piece[2 * n_ranks - 1 - r])) for r in range(n_ranks)])


def split_rows(
    batch: Batch,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    documents: bool,
    balanced: bool,
    n_labels: int | None = None,
) -> Microbatch:
    """The tokens and labels of this rank, and where they and all keys stand, on `device`.

    Every rank of `mesh` reads the same rows, so nobody needs to be told where the keys of the others stand.
    """
    length = batch.tokens_BL.shape[1]
    places = order(length, mesh.size(), balanced=balanced)
    padding_BL = batch.padding_BL() if n_labels is None else None
    if n_labels is None:
        n_labels = count_labels(batch.labels_BL[:, places[mesh.get_local_rank()]])
    batch = batch.map(lambda part: to_device(part, device))
    places = to_device(places, device)
    own_L, all_M = places[mesh.get_local_rank()], places.flatten()
    if documents:
        position_BL, own_documents, all_documents = (
            batch.positions_BL[:, own_L],
            batch.documents_BL[:, own_L],
            batch.documents_BL[:, all_M],
        )
    else:
        position_BL, own_documents, all_documents = own_L[None], None, None
    if padding_BL is not None:
        padding_BL = to_device(padding_BL, device)[:, own_L]
    positions = Positions(position_BL, own_documents, own_L[None], all_M[None], all_documents, padding_BL)
    return Microbatch(batch.tokens_BL[:, own_L], batch.labels_BL[:, own_L], positions, n_labels, batch.inputs)


def apply_context(model: nn.Module, mesh: DeviceMesh, *, all_to_all: bool) -> None:
    """Let the attentions of `model` see the keys of all ranks of `mesh`."""
    own_gather = partial(gather_tokens, mesh=mesh)
    for module in model.modules():
        if all_to_all and isinstance(module, Block):
            module.attention.kernel = cast(Kernel, HeadsForTokens(module.attention.kernel, mesh))
        if not all_to_all and isinstance(module, KeyValues):
            module.register_forward_hook(lambda _, args, out: tuple(map(own_gather, out)))


class HeadsForTokens:
    """A kernel that gives each rank all tokens of some heads, and takes the heads back (arXiv:2309.14509)."""

    def __init__(self, kernel: Kernel, mesh: DeviceMesh) -> None:
        self.kernel, self.mesh = kernel, mesh

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadsForTokens) and self.kernel == other.kernel

    def __hash__(self) -> int:
        return hash(self.kernel)

    def mask(self, positions: Positions) -> Mask:
        """The mask of whole rows, in the order in which the ranks' tokens follow each other."""
        assert positions.key_index_BM is not None
        return self.kernel.mask(Positions(positions.key_index_BM, positions.key_document_BM, positions.key_index_BM))

    def __call__(
        self, q_BNLH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, mask: Mask, *, sinks_N: Tensor | None = None, **rest: Any
    ) -> Tensor:
        q, k, v = (self._exchange(side, split=1, join=2) for side in (q_BNLH, k_BKLH, v_BKLH))
        if sinks_N is not None:
            sinks_N = sinks_N.chunk(self.mesh.size())[self.mesh.get_local_rank()]
        o = self.kernel(q, k, v, mask, sinks_N=sinks_N, **rest)
        return self._exchange(o, split=2, join=1)

    def _exchange(self, x: Tensor, *, split: int, join: int) -> Tensor:
        """Rank r sends piece s of dimension `split` to rank s, and puts what arrives together along `join`."""
        pieces = torch.stack(x.chunk(self.mesh.size(), split)).contiguous()
        arrived = functional.wait_tensor(functional.all_to_all_single(pieces, None, None, self.mesh))
        return torch.cat(arrived.unbind(0), join)
