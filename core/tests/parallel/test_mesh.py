"""Three views of the same ranks, by their coordinates."""

import subprocess
import sys
from itertools import product

import pytest
import torch
import torch.distributed as dist

from core.parallel.many_ranks import ManyRanks
from core.parallel.mesh import views
from core.parallel.settings import Degrees
from core.testing.layout_suite import degrees
from core.testing.ranks import run_ranks

AXES = {
    "token": ("pipeline", "replicate", "batch", "context", "tensor"),
    "weight": ("pipeline", "replicate", "shard", "tensor"),
    "expert": ("pipeline", "replicate", "shard", "expert"),
}
Place = dict[str, dict[str, tuple[int, list[int]]]]


def place(degrees_: Degrees) -> Place:
    """For every view and axis this rank's coordinate, and the ranks that differ from it in this axis alone."""
    found = views(degrees_, torch.device("cpu"))._asdict()
    return {
        view: {axis: (found[view][axis].get_local_rank(), found[view][axis].mesh.tolist()) for axis in axes}
        for view, axes in AXES.items()
    }


def coordinates(sizes: list[int]) -> list[tuple[int, ...]]:
    """Of every rank, the last axis running fastest."""
    return list(product(*(range(n) for n in sizes)))


@pytest.mark.parametrize(
    "given",
    [
        Degrees(shard=4),
        Degrees(replicate=2, shard=2),
        Degrees(context=2, tensor=2, expert=2),
        Degrees(pipeline=2, tensor=2, expert=2),
        Degrees(shard=2, tensor=2, expert=4),
        Degrees(replicate=2, context=2, expert=2),
        Degrees(shard=2, context=2, tensor=2, expert=4),
    ],
    ids=str,
)
def test_every_rank_has_its_place_in_three_grids(given: Degrees) -> None:
    found = run_ranks(place, given.world, given)
    shard, among = given.shard * given.context, given.shard * given.context * given.tensor
    sizes = {
        "token": [given.pipeline, given.replicate, given.shard, given.context, given.tensor],
        "weight": [given.pipeline, given.replicate, shard, given.tensor],
        "expert": [given.pipeline, given.replicate, among // given.expert, given.expert],
    }
    for view, axes in AXES.items():
        grid = coordinates(sizes[view])
        for rank, where in enumerate(grid):
            for i, axis in enumerate(axes):
                beside = [r for r, other in enumerate(grid) if other[:i] + other[i + 1 :] == where[:i] + where[i + 1 :]]
                assert found[rank][view][axis] == (where[i], beside), (view, axis, rank)


def numbers() -> tuple[int, int, bool, list[float], float]:
    """What a layout tells of a rank, and its sums."""
    settings = degrees(replicate=2, pipeline=2, tensor=2)
    layout = ManyRanks(settings, torch.device("cpu"))
    rank = dist.get_rank()
    mine = layout.sums(1.0, 2.0**-30 * rank)
    return layout.data_rank, layout.pipeline_rank, layout.is_first, mine, layout.sum_of_data(10.0 + layout.data_rank)


def test_a_layout_numbers_readers_and_stages() -> None:
    found = run_ranks(numbers, 8)
    assert [row[0] for row in found] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [row[1] for row in found] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [row[2] for row in found] == [True] + [False] * 7
    assert all(row[3] == [8.0, 28 * 2.0**-30] for row in found)
    assert all(row[4] == 21.0 for row in found)


def data_numbers() -> int:
    return ManyRanks(degrees(replicate=2, context=2, data_parallel_shard_degree=2), torch.device("cpu")).data_rank


def test_context_ranks_read_the_same_rows_and_others_different_ones() -> None:
    assert run_ranks(data_numbers, 8) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_process_alone_loads_no_dtensor() -> None:
    """torch.distributed.tensor takes a second to load, of which a start on one rank would have nothing."""
    slow = ("torch.distributed.tensor", "torch._dynamo", "sympy")
    code = f"import sys, core.train.trainer\nprint([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
