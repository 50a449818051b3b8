"""Degrees -> three views of the same ranks."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from core.parallel.settings import Degrees


class Views(NamedTuple):
    """The ranks as a grid, from outer to inner axis, under three names: one for tokens, one for each kind of weight.

    token    pipeline, replicate, batch, context, tensor     who reads which tokens
    weight   pipeline, replicate, shard, tensor              who keeps which dense weights    shard = batch x context
    expert   pipeline, replicate, shard, expert              who keeps which experts          the rest of them

    Tensor and context ranks serve as data ranks for experts.
    """

    degrees: Degrees
    token: DeviceMesh
    weight: DeviceMesh
    expert: DeviceMesh


def views(degrees: Degrees, device: torch.device) -> Views:
    """The views of all ranks of the process group, whose number must be the degrees' product."""
    outer = {"pipeline": degrees.pipeline, "replicate": degrees.replicate}
    among = degrees.shard * degrees.context * degrees.tensor

    def grid(**inner: int) -> DeviceMesh:
        axes = {**outer, **inner}
        return init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    return Views(
        degrees,
        grid(batch=degrees.shard, context=degrees.context, tensor=degrees.tensor),
        grid(shard=degrees.shard * degrees.context, tensor=degrees.tensor),
        grid(shard=among // degrees.expert, expert=degrees.expert),
    )


def stage_group(views: Views, device: torch.device) -> ProcessGroup:
    """The ranks that the weights of one pipeline stage lie on; all ranks without a pipeline."""
    degrees, axes = views.degrees, ("replicate", "shard", "tensor")
    if degrees.pipeline == 1:
        everyone = dist.group.WORLD
        assert everyone is not None
        return everyone
    shared = [axis for axis in axes if views.weight[axis].size() > 1]
    if len(shared) < 2:
        return views.weight[shared[0] if shared else "tensor"].get_group()
    shape = (degrees.pipeline, degrees.world // degrees.pipeline)
    return init_device_mesh(device.type, shape, mesh_dim_names=("pipeline", "stage"))["stage"].get_group()
