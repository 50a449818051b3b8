"""What a rank sends: the collectives that a computation dispatches, and the bytes that each makes it send.

Of n ranks in the group, and at the least, whatever the algorithm:

    all-gather       (n - 1) / n of the output      a ring passes on all pieces but one's own
    reduce-scatter   (n - 1) / n of the input       the same backwards
    all-reduce       2 (n - 1) / n of the tensor    a reduce-scatter, and an all-gather of its result
    all-to-all       the input but for the own part
    broadcast, send  the tensor
"""

from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group
from torch.utils._pytree import tree_iter

from core.parallel.mesh import Views

OUTPUT_ARGUMENT = -1
COLLECTIVES = {
    # operation: what it is, and which argument tells the size
    "_c10d_functional::all_gather_into_tensor": ("all-gather", OUTPUT_ARGUMENT),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", 0),
    "_c10d_functional::all_reduce": ("all-reduce", 0),
    "_c10d_functional::all_to_all_single": ("all-to-all", 0),
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::send": ("send", 0),
}
SILENT = (
    "_c10d_functional::wait_tensor",
    "_c10d_functional::_wrap_tensor_autograd",
    "c10d::recv_",
    "c10d::barrier",
    "c10d::monitored_barrier_",
)


class Message(NamedTuple):
    """One collective: its kind, the group that does it, and the bytes that this rank sends."""

    collective: str
    group: ProcessGroup
    n_bytes: int


def message(op: Any, args: tuple, out: Any) -> Message | None:
    """What a dispatched operation makes this rank send; None if it is no collective or the group is this rank alone."""
    if op.namespace not in ("c10d", "_c10d_functional") or op.name() in SILENT:
        return None
    assert op.name() in COLLECTIVES, f"{op} is a collective that nobody counts: add it to COLLECTIVES"
    collective, place = COLLECTIVES[op.name()]
    group = group_of(args)
    n = group.size()
    if n == 1:
        return None
    n_bytes = n_bytes_of(out if place == OUTPUT_ARGUMENT else args[place])
    if collective in ("all-gather", "reduce-scatter"):
        n_bytes -= n_bytes // n
    elif collective == "all-reduce":
        n_bytes = 2 * n_bytes * (n - 1) // n
    elif collective == "all-to-all":
        splits = args[2] or [1] * n
        n_bytes -= n_bytes * splits[group.rank()] // max(sum(splits), 1)
    return Message(collective, group, n_bytes)


def group_of(args: tuple) -> ProcessGroup:
    """The process group among the arguments of a collective: an object, or a name that comes last."""
    if isinstance(args[-1], str):
        return _resolve_process_group(GroupName(args[-1]))
    return next(ProcessGroup.unbox(arg) for arg in args if type(arg).__name__ == "ScriptObject")


def n_bytes_of(tree: Any) -> int:
    """Bytes of all tensors in a tree."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def axes(views: Views, *, experts: bool) -> dict[str, str]:
    """The axes along which the groups of the meshes lie, by the names of the groups; `experts` says whether there are.

    Where several axes have one group they are joined, `shard/expert`. "batch" is only what is not "shard"; experts with
    data ranks of their own have "expert shard".
    """
    degrees = views.degrees
    found: dict[str, list[str]] = {}
    asked = [(views.weight, name, name) for name in ("replicate", "shard", "tensor")]
    asked += [(views.token, name, name) for name in ("pipeline", "context", "tensor", "replicate", "batch")]
    if experts and degrees.expert * degrees.tensor > 1:
        asked += [(views.expert, "expert", "expert"), (views.expert, "shard", "expert shard")]
        asked += [(views.expert, "replicate", "expert replicate")]
    for view, axis, name in asked:
        names = found.setdefault(view[axis].get_group().group_name, [])
        if view[axis].size() > 1 and name not in names and not (names and name in ("batch", "expert replicate")):
            names.append(name)
    return {group: "/".join(names) for group, names in found.items()}
