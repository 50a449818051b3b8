"""Bytes sent, one collective at a time, against sums done by hand; and along which axis."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional
from torch.utils._python_dispatch import TorchDispatchMode

from core.parallel.collectives import all_gather, reduce_scatter
from core.parallel.fake import fake_ranks
from core.parallel.many_ranks import ManyRanks
from core.parallel.settings import Parallelism
from core.plan.traffic import axes, message

CPU = torch.device("cpu")


class Heard(TorchDispatchMode):
    """The messages of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (found := message(func, args, out)) is not None:
            self.messages.append((found.collective, found.n_bytes))
        return out


def test_one_collective_at_a_time():
    new = hasattr(dist, "all_gather_single")  # their names since torch 2.13
    gather = getattr(dist, "all_gather_single" if new else "all_gather_into_tensor")
    scatter = getattr(dist, "reduce_scatter_single" if new else "reduce_scatter_tensor")
    x = torch.zeros(12, 2)  # 96 bytes
    with fake_ranks(4, 1), Heard() as heard:
        group = dist.group.WORLD
        all_gather(x, 0, group)
        reduce_scatter(x, 0, group)
        functional.wait_tensor(functional.all_reduce(x, "sum", group))
        functional.wait_tensor(functional.all_to_all_single(x, None, None, group))
        functional.wait_tensor(functional.all_to_all_single(x, [3] * 4, [1, 2, 4, 5], group))
        gather(torch.zeros(48, 2), x)
        scatter(torch.zeros(3, 2), x)
        dist.all_reduce(x)
        dist.broadcast(x, 0)
        dist.send(x, 2)
        dist.recv(x, 0)
        dist.barrier()
        dist.all_reduce(x, group=dist.new_group([1]))
    assert heard.messages == [
        ("all-gather", 3 * 96),
        ("reduce-scatter", 3 * 24),
        ("all-reduce", 2 * 3 * 24),
        ("all-to-all", 3 * 24),
        ("all-to-all", 96 - 2 * 8),
        ("all-gather", 3 * 96),
        ("reduce-scatter", 3 * 24),
        ("all-reduce", 2 * 3 * 24),
        ("broadcast", 96),
        ("send", 96),
    ]


def test_a_collective_that_nobody_counts_is_noticed():
    x = torch.zeros(4)
    with fake_ranks(2, 0), Heard(), pytest.raises(AssertionError, match="add it to COLLECTIVES"):
        dist.all_gather([torch.zeros(4), torch.zeros(4)], x)


@pytest.mark.parametrize(
    ("settings", "world_size", "names"),
    [
        (Parallelism(), 4, {"shard"}),
        (Parallelism(expert_parallel_degree=4), 4, {"shard/expert"}),
        (Parallelism(expert_parallel_degree=2), 4, {"shard", "expert", "expert shard"}),
        (Parallelism(tensor_parallel_degree=2), 4, {"shard", "tensor", "expert shard"}),
        (Parallelism(tensor_parallel_degree=2), 2, {"tensor/expert shard"}),
        (
            Parallelism(context_parallel_degree=2, data_parallel_replicate_degree=2),
            8,
            {"shard", "context", "replicate"},
        ),
        (Parallelism(pipeline_parallel_degree=2), 2, {"pipeline"}),
    ],
)
def test_axes_of_groups(settings: Parallelism, world_size: int, names: set[str]):
    with fake_ranks(world_size, 1):
        found = axes(ManyRanks(settings, CPU).views, experts=True)
    assert set(found.values()) - {"", "batch"} == names
