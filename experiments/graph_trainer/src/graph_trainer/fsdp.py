"""Simple FSDP: a rank stores a piece of each weight, and whoever reads the weight finds it gathered.

The gather is an operation like any other, and its transpose scatters the gradient; nothing hooks a module. Eager it
would be slow, one message for each weight; in a graph the messages are nodes, which passes merge and move. Weights are
stored as `core.parallel.data` stores them, so that optimizer, norms and checkpoints see no difference; they are
gathered in the type that is computed in, and gradients are summed in fp32.

Under tensor parallelism a weight has two meshes: it is cut by its axes, and this rank's part of it by data ranks. What
is read is that part, and the gradient of a part that all tensor ranks have is summed over them first.
"""

from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.fx.traceback import annotate
from torch.nn import functional as F

from core.nn.decoder import Decoder
from core.nn.moe import Experts
from core.optim.weight import local_tensor
from core.parallel.collectives import all_gather, reduce_scatter
from core.parallel.mesh import Views
from core.parallel.settings import Parallelism
from core.parallel.tensor import local, zeros
from graph_trainer.trace import GATHER


class Sharing(NamedTuple):
    """How data ranks share a weight, or a tensor rank's part of it."""

    ranks: DeviceMesh
    dim: int
    size: int
    """Of that dimension, over all of these ranks."""
    dtype: torch.dtype
    """What the weight is read in."""
    copies: DeviceMesh | None
    """Ranks that have equal copies, over which a gradient is summed."""
    factor: float
    """1, or 0 where another rank's copy is added in this one's place."""


class Gather(torch.autograd.Function):
    """The whole of a weight, from the pieces of all ranks; backward adds up its gradient and scatters it."""

    @staticmethod
    def forward(ctx: Any, piece: Tensor, sharing: Sharing) -> Tensor:
        """The weight of this rank's `piece`, of any shape, cut along `sharing.dim`."""
        ctx.sharing, ctx.dtype, ctx.n_own = sharing, piece.dtype, piece.shape[sharing.dim]
        ranks, dim = sharing.ranks, sharing.dim
        with annotate({GATHER: True}):
            if ranks.size() == 1:
                return piece.to(sharing.dtype, copy=True)
            own = padded(piece.to(sharing.dtype).movedim(dim, 0), -(-sharing.size // ranks.size()))
            whole = all_gather(own.contiguous(), 0, ranks)
            return whole[: sharing.size].movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        sharing: Sharing = ctx.sharing
        gradient = grads[0].float()
        if sharing.copies is not None:
            gradient = functional.wait_tensor(functional.all_reduce(gradient, "sum", sharing.copies))
        ranks, dim = sharing.ranks, sharing.dim
        if ranks.size() == 1:
            return gradient.to(ctx.dtype), None
        each = -(-sharing.size // ranks.size())
        rows = padded(gradient.movedim(dim, 0), each * ranks.size()).contiguous()
        own = reduce_scatter(rows, 0, ranks)
        return own[: ctx.n_own].movedim(0, dim).to(ctx.dtype), None


def padded(rows: Tensor, n_rows: int) -> Tensor:
    """`rows` (R, ...), of any shape behind, with zeros up to `n_rows`: ranks send equally much."""
    missing = n_rows - rows.shape[0]
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)) if missing else rows


@cache
def gathering_class(cls: type[nn.Module], leaf: str) -> type[nn.Module]:
    """A subclass in which the attribute `leaf` is the gathered weight."""

    def weight(module: Any) -> Tensor:
        sharing = module.sharings[leaf]
        whole = cast(Tensor, Gather.apply(local_tensor(module._parameters[leaf]), sharing))
        return whole if sharing.factor == 1 else whole * sharing.factor

    members = {leaf: property(weight), "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), members)


def share_weights(model: Decoder, views: Views, *, compute_dtype: torch.dtype, settings: Parallelism) -> None:
    """Have every module of `model`, which has no memory yet, read its weights gathered from the ranks of `views`."""
    of_experts = {weight for part in model.modules() if isinstance(part, Experts) for weight in part.parameters()}
    placed: dict[nn.Parameter, tuple[nn.Parameter, Sharing]] = {}
    for module in list(model.modules()):
        for leaf, weight in list(module._parameters.items()):
            if weight is None:
                continue
            reading = vars(module).get("readings", {}).get(leaf)
            if weight not in placed:
                view = views.expert if weight in of_experts else views.weight
                placed[weight] = store_piece(weight, view, compute_dtype, expert=weight in of_experts)
            module._parameters[leaf], sharing = placed[weight]
            if reading is not None:
                copies = None if reading is local else views.weight["tensor"]
                sharing = sharing._replace(copies=copies, factor=float(reading is not zeros))
            if "sharings" not in vars(module):
                vars(module)["sharings"] = {}
            vars(module)["sharings"][leaf] = sharing
            module.__class__ = gathering_class(type(module), leaf)


def store_piece(
    weight: nn.Parameter, view: DeviceMesh, dtype: torch.dtype, *, expert: bool
) -> tuple[nn.Parameter, Sharing]:
    """This rank's piece of a weight, of any shape, as it is stored, and how it is shared."""
    whole, ranks = local_tensor(weight), view["shard"]
    dim = 1 if expert and whole.shape[0] < ranks.size() and whole.shape[1] % ranks.size() == 0 else 0
    pieces = whole.detach().chunk(ranks.size(), dim)
    rank = ranks.get_local_rank()
    own = pieces[rank] if rank < len(pieces) else whole.detach().narrow(dim, 0, 0)
    if isinstance(weight, DTensor):
        (cut,) = weight.placements
        mesh, n = view["shard", "tensor"], view["tensor"].size()
        shared = _StridedShard(dim, split_factor=n) if cut == Shard(dim) else Shard(dim)
        placements = [shared, cut]
    else:
        mesh, placements = ranks, [Shard(dim)]
    stride = torch.empty(weight.shape, device="meta").stride()
    spread = DTensor.from_local(own.clone(), mesh, placements, run_check=False, shape=weight.shape, stride=stride)
    sharing = Sharing(ranks, dim, whole.shape[dim], dtype, copies=None, factor=1.0)
    return nn.Parameter(spread, weight.requires_grad), sharing


def spread_like(piece: Tensor, weight: Tensor) -> Tensor:
    """This rank's piece of a gradient, as the gradient of `weight`, of any shape, which may be spread over ranks."""
    if not isinstance(weight, DTensor):
        return piece
    settings = {"run_check": False, "shape": weight.shape, "stride": weight.stride()}
    return DTensor.from_local(piece, weight.device_mesh, weight.placements, **settings)
