"""Whole matrices out of the slices of all ranks, dealt out so that each is computed once.

    slices on all ranks  --all-to-all-->  one whole matrix per rank  --function, all-to-all-->  slices of the results

Matrices are dealt out by size, the largest first, each to the rank that has least to do so far. In one round every rank
gets one at most, so that one whole matrix is there beside the slices. Experts that lie whole on a rank are computed
there, together, and only copies of them are sent.

Letters: N matrices of a stack (1 where there is none), R rows, C columns. A cut may leave ranks without any row.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import zip_longest
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as functional
from torch.distributed.tensor import DTensor

Ranges = tuple[slice, slice, slice]
"""A part of a stack of matrices (N, R, C)."""


class Cut(NamedTuple):
    """How a stack of matrices lies on a grid of ranks: each axis of the grid cuts a dimension, or has copies (None)."""

    shape: tuple[int, ...]
    """N, R and C."""
    grid: tuple[int, ...]
    dims: tuple[int | None, ...]

    def held_by(self, rank: int) -> Ranges:
        """What `rank` holds, counted from the first of the grid, its last axis fastest.

        Inner axes cut first: FSDP, the outer one, cuts what tensor or expert parallelism left of a weight.
        """
        start, size = [0, 0, 0], list(self.shape)
        for n, dim in zip(reversed(self.grid), reversed(self.dims), strict=True):
            rank, place = divmod(rank, n)
            if dim is not None:
                each = -(-size[dim] // n)
                first = min(place * each, size[dim])
                start[dim], size[dim] = start[dim] + first, min(each, size[dim] - first)
        n, rows, columns = (slice(first, first + length) for first, length in zip(start, size, strict=True))
        return n, rows, columns

    def copy(self, rank: int) -> int:
        """Number of the copy of the whole that the slice of `rank` belongs to."""
        number, stride = 0, 1
        for n, dim in zip(reversed(self.grid), reversed(self.dims), strict=True):
            rank, place = divmod(rank, n)
            if dim is None:
                number, stride = number + place * stride, stride * n
        return number


class Unit(NamedTuple):
    """Matrices `first` to `last` of the stack number `weight`, which `owner` computes; `sends` unless nobody else has
    any of them."""

    weight: int
    first: int
    last: int
    owner: int
    sends: bool

    def part(self, held: Ranges) -> Ranges:
        """What of the ranges that a rank holds is in this unit."""
        first = max(held[0].start, self.first)
        return slice(first, max(min(held[0].stop, self.last), first)), held[1], held[2]


def cut_of(weight: Tensor) -> Cut:
    """How a stored weight, a matrix (R, C) or a stack (N, R, C), lies on its mesh."""
    assert isinstance(weight, DTensor)
    missing = 3 - weight.dim()
    dims = tuple(None if each.is_replicate() else each.dim + missing for each in weight.placements)  # pyrefly: ignore
    return Cut((1,) * missing + tuple(weight.shape), tuple(weight.device_mesh.shape), dims)


@lru_cache(maxsize=8)
def deal(cuts: tuple[Cut, ...]) -> list[Unit]:
    """Who computes which of the matrices that are cut so."""
    load = [0] * prod(cuts[0].grid)
    units = []
    for weight in sorted(range(len(cuts)), key=lambda number: (-prod(cuts[number].shape[1:]), number)):
        cut = cuts[weight]
        for first, last, ranks in _jobs(cut):
            owner = min(ranks, key=lambda rank: (load[rank], rank))
            load[owner] += (last - first) * prod(cut.shape[1:])
            units.append(Unit(weight, first, last, owner, sends=len(ranks) > 1))
    return units


def _jobs(cut: Cut) -> Iterator[tuple[int, int, Sequence[int]]]:
    """Ranges of matrices that are computed together, and the ranks that may do it: all of them for a matrix that is in
    pieces, else those that have it."""
    n_ranks = prod(cut.grid)
    if any(n > 1 and dim in (1, 2) for n, dim in zip(cut.grid, cut.dims, strict=True)):
        yield from ((i, i + 1, range(n_ranks)) for i in range(cut.shape[0]))
        return
    holders: dict[tuple[int, int], list[int]] = {}
    for rank in range(n_ranks):
        stack, _, _ = cut.held_by(rank)
        holders.setdefault((stack.start, stack.stop), []).append(rank)
    yield from ((first, last, ranks) for (first, last), ranks in holders.items() if last > first)


def map_matrices(
    function: Callable[[Tensor], Tensor],
    weights: Sequence[Tensor],
    slices: Sequence[Tensor],
    group: ProcessGroup,
    device: torch.device,
) -> list[Tensor]:
    """This rank's slices of `function` of whole matrices (N, R, C), of which `slices` are parts, cut as `weights` are.

    The ranks of `group` are those that the weights lie on, and all call. What is sent and computed lies on `device`.
    """
    if not weights:
        return []
    cuts, rank = tuple(map(cut_of, weights)), group.rank()
    assert all(prod(cut.grid) == group.size() for cut in cuts), "the weights lie on other ranks than the group's"
    stacks = [each if each.dim() == 3 else each.unsqueeze(0) for each in slices]
    results = [torch.empty_like(stack) for stack in stacks]
    queues: list[list[Unit]] = [[] for _ in range(group.size())]
    for unit in deal(cuts):
        if unit.sends:
            queues[unit.owner].append(unit)
        elif unit.owner == rank:
            results[unit.weight].copy_(function(stacks[unit.weight].to(device)))
    for round_ in zip_longest(*queues):
        _exchange(function, cuts, [unit for unit in round_ if unit], stacks, results, group, device)
    return [result.view_as(part) for result, part in zip(results, slices, strict=True)]


def _exchange(
    function: Callable[[Tensor], Tensor],
    cuts: Sequence[Cut],
    units: Sequence[Unit],
    stacks: Sequence[Tensor],
    results: Sequence[Tensor],
    group: ProcessGroup,
    device: torch.device,
) -> None:
    """One round: every rank computes at most one of the units."""
    rank, ranks = group.rank(), range(group.size())
    sent: dict[int, Tensor] = {}
    for unit in units:
        cut = cuts[unit.weight]
        if cut.copy(unit.owner) == cut.copy(rank):
            sent[unit.owner] = stacks[unit.weight][_within(unit, cut, rank)]
    mine = next((unit for unit in units if unit.owner == rank), None)
    parts: dict[int, Ranges] = {}
    if mine is not None:
        parts = {each: mine.part(cuts[mine.weight].held_by(each)) for each in ranks}
    senders = {} if mine is None else {r: p for r, p in parts.items() if _same_copy(cuts[mine.weight], r, rank)}
    received = _all_to_all(sent, {each: _size(part) for each, part in senders.items()}, stacks[0], group, device)
    answers: dict[int, Tensor] = {}
    if mine is not None:
        whole = received[rank].new_empty(mine.last - mine.first, *cuts[mine.weight].shape[1:])
        for each, part in senders.items():
            whole[_from(part, mine.first)] = received[each].view(_shape(part))
        done = function(whole).to(stacks[0].dtype)
        answers = {each: done[_from(part, mine.first)] for each, part in parts.items()}
    wanted = {unit.owner: _within(unit, cuts[unit.weight], rank) for unit in units}
    sizes = {unit.owner: results[unit.weight][wanted[unit.owner]].numel() for unit in units}
    for owner, values in _all_to_all(answers, sizes, stacks[0], group, device).items():
        (unit,) = (unit for unit in units if unit.owner == owner)
        target = results[unit.weight][wanted[owner]]
        target.copy_(values.view(target.shape))


def _all_to_all(
    sent: dict[int, Tensor], sizes: dict[int, int], like: Tensor, group: ProcessGroup, device: torch.device
) -> dict[int, Tensor]:
    """What the ranks in `sizes` sent to this one, so many numbers each, in exchange for `sent`, by rank."""
    ranks = range(group.size())
    flat = [sent[rank].flatten().to(device) for rank in ranks if rank in sent]
    to = [sent[rank].numel() if rank in sent else 0 for rank in ranks]
    of = [sizes.get(rank, 0) for rank in ranks]
    joined = torch.cat(flat) if flat else torch.empty(0, dtype=like.dtype, device=device)
    got = functional.wait_tensor(functional.all_to_all_single(joined, of, to, group)).split(of)
    return {rank: got[rank] for rank in sizes}


def _same_copy(cut: Cut, rank: int, other: int) -> bool:
    return cut.copy(rank) == cut.copy(other)


def _within(unit: Unit, cut: Cut, rank: int) -> Ranges:
    """Where the slice of `rank` has what is in a unit, counted in the slice."""
    held = cut.held_by(rank)
    stack, rows, columns = unit.part(held)
    start = held[0].start
    return (
        slice(stack.start - start, stack.stop - start),
        slice(0, rows.stop - rows.start),
        slice(0, columns.stop - columns.start),
    )


def _from(part: Ranges, first: int) -> Ranges:
    """A part, its matrices counted from `first`."""
    return slice(part[0].start - first, part[0].stop - first), part[1], part[2]


def _shape(part: Ranges) -> tuple[int, ...]:
    return tuple(each.stop - each.start for each in part)


def _size(part: Ranges) -> int:
    return prod(_shape(part))
