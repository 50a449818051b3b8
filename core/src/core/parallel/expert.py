"""Expert parallelism: each rank keeps some of the experts, and tokens travel to them."""

from collections.abc import Callable

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from core.nn.dispatch import Dispatcher
from core.nn.moe import Experts, MoE
from core.parallel.rules import cut_dim, named_weights
from core.parallel.tensor import local, read, store_as_dtensor


def apply_expert(model: nn.Module, mesh: DeviceMesh, dispatcher: Callable[[ProcessGroup], Dispatcher]) -> None:
    """Cut the experts of `model` over `mesh`, and give each mixture a dispatcher that travels over its group."""
    for module in model.modules():
        if isinstance(module, Experts):
            for owner, leaf, axes, _ in list(named_weights(module)):
                dim = cut_dim(axes, "expert")
                assert dim is not None, f"{leaf} of experts has axes {axes}"
                store_as_dtensor(owner, leaf, mesh, Shard(dim), {})
                read(owner, leaf, local)
        if isinstance(module, MoE):
            module.dispatcher = dispatcher(mesh.get_group())
