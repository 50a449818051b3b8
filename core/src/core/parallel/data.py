"""Data parallelism: FSDP and HSDP, and the gradient norm over weights of several meshes.

Gradients are summed over ranks, never averaged: the loss already carries the step's number of tokens.
"""

from itertools import pairwise
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_common
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo
from torch.distributed.tensor import DTensor, Shard

from core.config.errors import UserError
from core.nn.decoder import Decoder
from core.nn.moe import Experts
from core.optim.clip import squared_norms
from core.optim.weight import local_tensor
from core.parallel.layout import stacks
from core.parallel.mesh import Views
from core.parallel.settings import Degrees, Parallelism

HAS_MESH_PER_WEIGHT = hasattr(_fsdp_common, "ShardPlacementResult")
"""Whether weights of one group may lie on several meshes (torch 2.12)."""


def expert_problem(degrees: Degrees) -> str | None:
    """What keeps a model with experts from these ranks: the degree that this release of torch cannot spread them by."""
    if HAS_MESH_PER_WEIGHT or degrees.expert == degrees.tensor == 1:
        return None
    axis = "expert" if degrees.expert > 1 else "tensor"
    degree = getattr(degrees, axis)
    return f"{axis}_parallel_degree {degree} with experts needs torch 2.12, this is {torch.__version__}"


def check_frozen(model: nn.Module) -> None:
    """Raise `UserError` for weights of whole numbers, as frozen ones of 4 bits are, which FSDP of torch 2.11 does not
    take: it asks every weight for a gradient, and then changes its mind."""
    bits = next((name for name, weight in model.named_parameters() if not weight.is_floating_point()), None)
    if bits is not None and not HAS_MESH_PER_WEIGHT:
        raise UserError(
            f"converters: {bits} in 4 bits on several ranks needs torch 2.12, this is {torch.__version__}: use one "
            "rank, or set quantize_base false"
        )


def apply_data(
    model: Decoder,
    views: Views,
    *,
    compute_dtype: torch.dtype,
    settings: Parallelism,
) -> None:
    """Shard every block, the embedding, the head, and what is left, over the ranks of `views` that hold equal weights.

    Experts lie on a mesh of their own inside their block's group, so that no hook stands within a block (torch 2.13:
    selective checkpointing and torch.compile both lose their way there). Weights are gathered in `compute_dtype`,
    gradients summed in fp32.
    """
    check_frozen(model)
    dense = mesh_info(views.weight)
    same = views.degrees.expert == views.degrees.tensor == 1
    sparse = dense if same else mesh_info(views.expert)
    pin = dense.mesh.device_type != "cpu"  # pinning asks for an accelerator (torch 2.13)
    reshard = settings.fsdp_reshard_after_forward
    offload = CPUOffloadPolicy(pin_memory=pin) if settings.cpu_offload else OffloadPolicy()
    options: dict[str, Any] = {
        "mesh": dense.mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        "offload_policy": offload,
        "reshard_after_forward": reshard == "always" or (reshard == "default" and views.degrees.pipeline == 1),
    }
    for block in (block for stack in stacks(model) for block in stack.layers.values()):
        experts = {weight for part in block.modules() if isinstance(part, Experts) for weight in part.parameters()}

        def where_to(weight: nn.Parameter, experts: set = experts) -> Any:
            if weight not in experts:
                return placed(Shard(0), dense)
            few = weight.shape[0] < sparse.shard_mesh_size * views.degrees.expert
            even = weight.shape[1] % sparse.shard_mesh_size == 0  # FSDP cuts other dimensions into equal pieces alone
            return placed(Shard(1 if few and even else 0), sparse)

        if experts and (problem := expert_problem(views.degrees)):
            raise UserError(f"parallelism.{problem}")
        fully_shard(block, **options, shard_placement_fn=where_to if experts else None)
    if views.degrees.expert > 1:
        prefetch(list(model.layers.values()))
    used_once = not model.config.tie_embeddings and not model.ahead
    if used_once and model.tok_embeddings is not None:
        embedding = fully_shard(model.tok_embeddings, **options)
        embedding.set_unshard_in_backward(False)  # a look-up's backward reads no weight
    if used_once and model.norm is not None and model.output is not None:
        at_once = options | {"reshard_after_forward": reshard == "always"}  # backward begins with them
        fully_shard([model.norm, model.output], **at_once)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums


def placed(placement: Shard, mesh: FSDPMeshInfo) -> Any:
    """How FSDP wants to hear where a weight lies; where it cannot hear of a mesh, all lie on the one of their group."""
    return _fsdp_common.ShardPlacementResult(placement, mesh) if HAS_MESH_PER_WEIGHT else placement


def prefetch(blocks: list[nn.Module]) -> None:
    """Gather a block's weights while its neighbour computes, though the host waits for counts of tokens in between."""
    for block, following in pairwise(cast(list[FSDPModule], blocks)):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])


def mesh_info(view: DeviceMesh) -> FSDPMeshInfo:
    """The axes of a view that hold equal weights, as FSDP wants to hear of them."""
    if view["replicate"].size() > 1:
        return HSDPMeshInfo(mesh=view["replicate", "shard"], replicate_mesh_dim=0, shard_mesh_dim=1)
    return FSDPMeshInfo(mesh=view["shard"], shard_mesh_dim=0)


def squared_norm_parts(gradients: list[Tensor], n_copies: int) -> Tensor:
    """This rank's parts of the squared 2-norms of gradients, of any shape, (n,) in fp64; the ranks' parts add up to it.

    `n_copies` ranks hold each gradient that is not cut (those of one pipeline stage); one that is cut into p pieces is
    held by n_copies / p ranks, whatever its mesh.
    """
    shares = [count_pieces(gradient) / n_copies for gradient in gradients]
    squares = squared_norms([local_tensor(gradient) for gradient in gradients])
    return squares * torch.tensor(shares, dtype=torch.float64, device=squares.device)


def count_pieces(gradient: Tensor) -> int:
    """Into how many pieces a gradient, of any shape, is cut."""
    if not isinstance(gradient, DTensor):
        return 1
    assert not any(placement.is_partial() for placement in gradient.placements), "a gradient is still partial"
    cuts = zip(gradient.placements, gradient.device_mesh.shape, strict=True)
    return prod(size for placement, size in cuts if not placement.is_replicate())
