"""Tensor parallelism with sequence parallelism.

Outside a region every token lives on one rank; the loss is the sum over ranks; every backward is the transpose of its
forward. Hence the gradient of a weight that is not cut is a partial sum: always.

Inside a region each rank sees all tokens, and its own heads, hidden columns or rows of the vocabulary. Modules compute
with plain tensors; a DTensor is only the label on a stored weight, for FSDP, gradient norms and checkpoints.

What follows from the three sentences, for a block of two regions on n ranks:

    x (B, L/n, D) -> norm -> [gather -> wq wk wv -> attention of N/n heads -> wo -> scatter_sum] -> + x -> ...

A region begins where a matrix is cut by its output axis: tokens are gathered, and backward sums the gradients of the
ranks and returns each its tokens, because that is the transpose. It ends where a matrix is cut by its input axis: each
rank has a part of every token's sum, and scatter_sum adds the parts and keeps its own tokens; backward gathers. So a
region sends twice (n - 1)/n of its tokens, as an all-reduce would, and norms and residuals are computed once, not n
times. A weight that is not cut, such as a norm's, saw its rank's tokens alone, or its rank's heads: either way its
gradient is a part of a sum, which is added up over the ranks. A bias behind a sum (of `wo`) is added by the first rank
alone. Nobody averages: the loss already has the denominator of the whole step.

Letters: B rows, L length, D width, V vocabulary; what is cut is named by its local size.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from core.data.packing import IGNORE
from core.nn.layers import Embedding
from core.nn.moe import Experts
from core.parallel.collectives import all_gather, reduce_scatter
from core.parallel.rules import cut_dim, named_weights
from core.parallel.vocabulary import Vocabulary

Reading = Callable[[Tensor], Tensor]


@cache
def reading_class(cls: type[nn.Module], leaf: str) -> type[nn.Module]:
    """A subclass in which the attribute `leaf` is what `readings[leaf]` of an instance makes of the stored weight.

    Between uses FSDP stores its piece, on a mesh of more axes, and asks for that one (torch 2.13).
    """

    def weight(module: Any) -> Tensor:
        weight = module._parameters[leaf]
        return module.readings[leaf](weight) if weight.device_mesh.ndim == 1 else weight

    members = {leaf: property(weight), "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), members)


def read(owner: nn.Module, leaf: str, reading: Reading) -> None:
    """Let whoever asks `owner` for its weight `leaf` find `reading` of it, a plain tensor; what is stored stays in the
    module's table of parameters, so that names, checkpoints and FSDP see no difference.

    The class of `owner` alone changes, as by `torch.nn.utils.parametrize`: its forward may be wrapped, replaced, or
    that of a parent.
    """
    if "readings" not in vars(owner):
        vars(owner)["readings"] = {}
    vars(owner)["readings"][leaf] = reading
    if not isinstance(getattr(type(owner), leaf, None), property):
        owner.__class__ = reading_class(type(owner), leaf)


def local(weight: Tensor) -> Tensor:
    """Of a cut weight, of any shape, the own piece."""
    return weight.to_local()  # pyrefly: ignore[missing-attribute] - a DTensor


def summed(weight: Tensor) -> Tensor:
    """Of a copied weight, of any shape, the copy; the gradients of the copies are parts of a sum."""
    return weight.to_local(grad_placements=[Partial()])  # pyrefly: ignore[missing-attribute] - a DTensor


def zeros(weight: Tensor) -> Tensor:
    """Of a copied weight, of any shape, that joins a sum over ranks, zeros: another rank adds it."""
    return summed(weight) * 0.0


def stored(owner: nn.Module, leaf: str) -> nn.Parameter:
    """A weight as it is stored, whatever the module reads."""
    weight = owner._parameters[leaf]
    assert weight is not None
    return weight


def store_as_dtensor(
    owner: nn.Module, leaf: str, mesh: DeviceMesh, placement: Any, placed: dict[nn.Parameter, Any]
) -> None:
    """Store a weight as a DTensor; a tied one stays one object."""
    weight = stored(owner, leaf)
    if weight not in placed:
        spread = distribute_tensor(weight.data, mesh, [placement], src_data_rank=None)
        placed[weight] = nn.Parameter(spread, weight.requires_grad)
    owner._parameters[leaf] = placed[weight]


def gather_tokens(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The tokens of n ranks, (B, n L, ...) of (B, L, ...); backward returns each rank's their summed gradient."""
    return all_gather(x.contiguous(), 1, mesh)


def scatter_sum(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's tokens, (B, L, ...) of (B, n L, ...), summed over the n ranks; backward gathers."""
    return reduce_scatter(x.contiguous(), 1, mesh)


def apply_tensor(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cut the weights of `model` over `mesh` by their axes, and put communication at the doors of the regions.

    A region is a module whose AXES cut a matrix: tokens are gathered in front of it where an output axis is cut, and
    summed and scattered behind it where an input axis is.
    """
    placed: dict[nn.Parameter, Any] = {}
    once = summed if mesh.get_local_rank() == 0 else zeros
    for module in list(model.modules()):
        if isinstance(module, Experts):
            continue
        gathers = scatters = False
        for owner, leaf, axes, summand in list(named_weights(module)):
            dim = cut_dim(axes, "tensor")
            store_as_dtensor(owner, leaf, mesh, Replicate() if dim is None else Shard(dim), placed)
            read(owner, leaf, once if summand else summed if dim is None else local)
            if dim is not None and len(axes) > 1:
                gathers |= dim < len(axes) - 1
                scatters |= dim == len(axes) - 1
        if isinstance(module, Embedding):
            look_up_own_rows(module, mesh)
        else:
            if gathers:
                module.register_forward_pre_hook(lambda _, args: (gather_tokens(args[0], mesh), *args[1:]))
            if scatters:
                module.register_forward_hook(lambda _, args, out: scatter_sum(out, mesh))


def look_up_own_rows(embedding: Embedding, mesh: DeviceMesh) -> None:
    """Ids of other ranks' rows give zeros; the sum over ranks has every row."""
    rows, n_words = embedding.forward, stored(embedding, "weight").shape[0]

    def forward(tokens_BL: Tensor) -> Tensor:
        first, n = own_vocabulary(n_words, mesh)
        own_BL = (tokens_BL >= first) & (tokens_BL < first + n)
        if n == 0:
            weight = embedding.weight  # its sum, 0, keeps this rank in the backward that the others wait for
            return scatter_sum(weight.new_zeros(*tokens_BL.shape, weight.shape[1]) + weight.sum(), mesh)
        return scatter_sum(rows(torch.where(own_BL, tokens_BL - first, 0)) * own_BL.unsqueeze(-1), mesh)

    embedding.forward = forward


def own_vocabulary(size: int, mesh: DeviceMesh) -> tuple[int, int]:
    """First row and number of rows of this rank, as `Shard(0)` cuts a vocabulary of `size`."""
    each = -(-size // mesh.size())
    first = min(mesh.get_local_rank() * each, size)
    return first, min(each, size - first)


class CutVocabulary(Vocabulary):
    """The words of one rank of `mesh`, and logits for the tokens of all its ranks.

    What is summed over the vocabulary is scattered over tokens at once: half the traffic of all ranks getting the sums
    of all tokens.
    """

    def __init__(self, mesh: DeviceMesh, size: int) -> None:
        super().__init__(size, mesh.size())
        self.mesh = mesh
        self.first, self.n = own_vocabulary(size, mesh)

    def max(self, logits_BLv: Tensor) -> Tensor:
        own_BL = logits_BLv.detach().amax(-1) if self.n else logits_BLv.new_full(logits_BLv.shape[:-1], -torch.inf)
        return functional.wait_tensor(functional.all_reduce(own_BL, "max", self.mesh))

    def sum(self, values_BLv: Tensor) -> Tensor:
        return scatter_sum(values_BLv.sum(-1), self.mesh)

    def pick(self, values_BLv: Tensor, labels_BL: Tensor) -> Tensor:
        picked_BL = values_BLv.sum(-1)  # 0 without a word; still a part of the backward that the others wait for
        if self.n:
            index_BL1, own_BL1 = self.find(labels_BL)
            picked_BL = values_BLv.gather(-1, index_BL1).masked_fill(~own_BL1, 0.0).squeeze(-1)
        return scatter_sum(picked_BL, self.mesh)

    def own_tokens(self, values_BL: Tensor) -> Tensor:
        return values_BL.chunk(self.mesh.size(), 1)[self.mesh.get_local_rank()]

    def all_tokens(self, values_Bl: Tensor) -> Tensor:
        return gather_tokens(values_Bl, self.mesh)

    def total(self, values_BL: Tensor) -> Tensor:
        return functional.wait_tensor(functional.all_reduce(values_BL, "sum", self.mesh))

    def find(self, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
        own_BL1 = ((labels_BL >= self.first) & (labels_BL < self.first + self.n)).unsqueeze(-1)
        return torch.where(own_BL1, labels_BL.unsqueeze(-1) - self.first, 0), own_BL1

    def cross_entropy(self, logits_BLv: Tensor, labels_BL: Tensor) -> Tensor:
        loss_Bl = self.logsumexp(logits_BLv) - self.pick(logits_BLv, labels_BL)
        return loss_Bl.masked_fill(self.own_tokens(labels_BL) == IGNORE, 0.0)
