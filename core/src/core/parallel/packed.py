"""Numbers that converted layers need of all ranks, and weights that travel between them as bytes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as functional
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from core.nn.adapter import Adapted
from core.nn.decoder import Decoder
from core.nn.product import PackedProduct, layer_products
from core.parallel.mesh import Views
from core.parallel.rules import cut_dim, named_weights
from core.parallel.tensor import stored


def join_maxima(model: nn.Module, views: Views) -> None:
    """Have every converted layer find maxima over all ranks that compute with parts of its tensors."""
    axes = [views.token[axis] for axis in ("replicate", "batch", "context", "tensor")]
    groups = [axis.get_group() for axis in axes if axis.size() > 1]

    def over_ranks(maxima: Tensor) -> Tensor:
        for group in groups:
            maxima = functional.wait_tensor(functional.all_reduce(maxima, "max", group))
        return maxima

    for _, product in layer_products(model):
        product.maximum = over_ranks


def join_columns(model: Decoder, views: Views) -> None:
    """Have every adapted layer whose inputs are cut sum over all of them."""
    if views.degrees.tensor == 1:
        return
    group = views.weight["tensor"].get_group()

    def over_ranks(sums: Tensor) -> Tensor:
        return functional.wait_tensor(functional.all_reduce(sums, "sum", group))

    for module in model.modules():
        for layer, leaf, axes, _ in named_weights(module):
            if isinstance(layer, Adapted) and leaf == "weight" and cut_dim(axes, "tensor") == len(axes) - 1:
                layer.sum_columns = over_ranks


class PackedWeights:
    """The weights of this rank that are gathered as bytes, by FSDP's hooks on the slices that it stores."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self.found: dict[PackedProduct, DTensor] = {}
        for model in models:
            for layer, product in layer_products(model):
                weight = stored(layer, "weight")
                if isinstance(layer, Adapted) and layer.magnitude is not None:
                    continue  # the lengths of its rows are those of the weight's own numbers
                if isinstance(product, PackedProduct) and product.packs and rows_are_shared(weight):
                    assert isinstance(weight, DTensor)
                    self.found[product] = weight
        for product, weight in self.found.items():
            pack(weight, product)

    @torch.no_grad()
    def measure(self, group: ProcessGroup) -> None:
        """Find the largest number of each, in one collective of the ranks of `group`."""
        if not self.found:
            return
        own = [largest(weight._local_tensor) for weight in self.found.values()]
        maxima = functional.wait_tensor(functional.all_reduce(torch.stack(own), "max", group))
        for product, amax in zip(self.found, maxima.unbind(), strict=True):
            product.weight_amax = amax


def largest(piece: Tensor) -> Tensor:
    """The largest absolute number of a tensor of any shape, 0 where it has none."""
    kind = torch.promote_types(piece.dtype, torch.float32)
    return torch.linalg.vector_norm(piece.to(kind), torch.inf) if piece.numel() else piece.new_zeros((), dtype=kind)


def rows_are_shared(weight: Tensor) -> bool:
    """Whether a stored weight, of any shape, is gathered by its first dimension: hooks see no other."""
    if not isinstance(weight, DTensor):
        return False
    names = weight.device_mesh.mesh_dim_names or ()
    return "shard" in names and getattr(weight.placements[names.index("shard")], "dim", None) == 0


def pack(weight: DTensor, product: PackedProduct) -> None:
    """Let FSDP gather a weight (rows, ...) as bytes: it asks the slice that it stores for these two functions."""
    slice_: Any = weight._local_tensor

    def before(mesh: Any, size: torch.Size, stride: Any, module: Any, policy: Any) -> tuple:
        piece = weight._local_tensor
        bits, missing = product.packed(piece), -(-size[0] // mesh.size()) - piece.shape[0]
        return (F.pad(bits, (0, 0) * (piece.dim() - 1) + (0, missing)) if missing else bits,), size

    def after(outputs: Any, size: torch.Size, dtype: torch.dtype, *, out: Any = None) -> Any:
        found = product.unpacked(outputs[0][: size[0]], dtype)
        if out is None:
            return found, (found,)
        own = out._local_tensor if isinstance(out, DTensor) else out
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(own):
            own.copy_(found)
        return None

    slice_.fsdp_pre_all_gather, slice_.fsdp_post_all_gather = before, after
