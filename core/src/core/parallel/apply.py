"""The order of wrapping, once for all models: tensor, expert, context, checkpoint policy, compile, data."""

from typing import Any

import torch
from torch.distributed import _functional_collectives as functional
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from core.nn.balance import routers
from core.nn.decoder import Decoder
from core.nn.init import LocalSlice
from core.parallel.context import apply_context
from core.parallel.data import apply_data
from core.parallel.expert import apply_expert
from core.parallel.layout import Wrapping
from core.parallel.mesh import Views
from core.parallel.packed import join_columns, join_maxima
from core.parallel.rules import check_axes
from core.parallel.settings import Parallelism
from core.parallel.tensor import apply_tensor


def parallelize(model: Decoder, views: Views, settings: Parallelism, wrapping: Wrapping) -> None:
    """Spread a model, or a stage of one, over the ranks of `views`.

    The model is on the meta device still, and gets its memory afterwards.
    """
    check_axes(model)
    degrees = views.degrees
    if degrees.tensor > 1:
        apply_tensor(model, views.weight["tensor"])
        if settings.enable_async_tensor_parallel:
            overlap()
    if degrees.expert > 1:
        apply_expert(model, views.expert["expert"], wrapping.dispatcher)
    if degrees.context > 1:
        all_to_all = settings.context_parallel_rotate_method == "alltoall"
        apply_context(model, views.token["context"], all_to_all=all_to_all)
    if degrees.tensor * degrees.context > 1:
        sum_over_rows(model, views)
    join_maxima(model, views)
    join_columns(model, views)
    wrapping.of_one_rank(model)
    share_weights = wrapping.share_weights or apply_data
    share_weights(model, views, compute_dtype=wrapping.compute_dtype, settings=settings)


def overlap() -> None:
    """Let torch.compile cut products and their communication into pieces that overlap (GPUs with symmetric memory)."""
    import torch._inductor.config

    torch._inductor.config._micro_pipeline_tp = True


def sum_over_rows(model: Decoder, views: Views) -> None:
    """Let routers count the choices of whole rows, of which a rank sees a part, and know which of its tokens count."""
    groups = [views.token[axis].get_group() for axis in ("context", "tensor")]

    def add_up(_: Any, args: Any, chosen_BE: torch.Tensor) -> torch.Tensor:
        for group in groups:
            chosen_BE = functional.wait_tensor(functional.all_reduce(chosen_BE, "sum", group))
        return chosen_BE

    tensor = views.token["tensor"]

    def own(_: Any, args: Any, padding_BL: torch.Tensor) -> torch.Tensor:
        return padding_BL.chunk(tensor.size(), 1)[tensor.get_local_rank()]

    for router in routers(model).values():
        router.row_counts.register_forward_hook(add_up)
        router.own_tokens.register_forward_hook(own)


def dtensor_slice(weight: torch.Tensor) -> LocalSlice:
    """The piece of a weight, of any shape, that lies on this rank, and where it begins in the whole."""
    if not isinstance(weight, DTensor):
        return LocalSlice(weight, (0,) * weight.dim())
    shape, start = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    piece = weight.to_local()
    assert piece.shape == shape, f"piece of shape {tuple(piece.shape)}, expected {shape}"
    return LocalSlice(piece, start)


def row_blocks(weight: torch.Tensor, size: int) -> torch.Tensor:
    """Zeros in fp32, one for each block of `size` numbers in the rows of a weight (..., C), cut as the weight is.

    Of a cut row each rank must have whole blocks.
    """
    assert isinstance(weight, DTensor)
    shape = torch.Size((*weight.shape[:-1], -(-weight.shape[-1] // size)))
    own = weight.to_local()
    zeros = own.new_zeros((*own.shape[:-1], -(-own.shape[-1] // size)), dtype=torch.float32)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(zeros, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=stride)
