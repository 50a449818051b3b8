"""Whole matrices out of the slices of all ranks, dealt out so that each is computed once.

    slices on all ranks  --all-to-all-->  whole matrices, here and there  --all-to-all-->  slices of their results

Matrices are dealt out by size, the largest first, each to the one of the ranks with a piece of it that has least to do
so far. In one round a rank gets as many as fit into the largest matrix, so that no more than that is there beside the
slices. Experts that lie whole on a rank are computed there, together, and only copies of them are sent.

The tensors of a plan have no numbers: what travels is made as large as it is, and nothing is copied into it.

Letters: N matrices of a stack (1 where there is none), R rows, C columns. A cut may leave ranks without any row.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as functional
from torch.distributed.tensor import DTensor

Ranges = tuple[slice, slice, slice]
"""A part of a stack of matrices (N, R, C)."""

StackPart = tuple[Tensor, Ranges]
"""Numbers to be sent, or the place of those that arrive: a stack of matrices (N, R, C), and which part of it."""


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
    """Matrices `first` to `last` of the stack number `weight`, which `owner` computes; `travels` unless it alone has
    them."""

    weight: int
    first: int
    last: int
    owner: int
    travels: bool

    def within(self, held: Ranges) -> Ranges | None:
        """What of the ranges that a rank holds is in this unit, counted from its first matrix; None for nothing."""
        first, last = max(held[0].start, self.first), min(held[0].stop, self.last)
        empty = first >= last or any(part.start == part.stop for part in held[1:])
        return None if empty else (slice(first - self.first, last - self.first), held[1], held[2])


class Job(NamedTuple):
    """A unit as its owner computes it: the shape of the whole, who sends which part, and who gets which."""

    shape: tuple[int, ...]
    senders: list[tuple[int, Ranges]]
    holders: list[tuple[int, Ranges]]


class Round(NamedTuple):
    """What one rank does at once: it sends parts of its slices to owners, has jobs, and gets parts of its slices back.

    A part is its owner, the number of its weight, and its place in the slice; those of `sent` are in `got` as well.
    """

    sent: list[tuple[int, int, Ranges]]
    jobs: list[Job]
    got: list[tuple[int, int, Ranges]]


class RankPlan(NamedTuple):
    """What one rank does: the units that it computes for itself, and rounds with the others."""

    alone: list[Unit]
    rounds: list[Round]


def cut_of(weight: Tensor) -> Cut:
    """How a stored weight, a matrix (R, C) or a stack (N, R, C), lies on its mesh."""
    assert isinstance(weight, DTensor)
    missing = 3 - weight.dim()
    dims = tuple(None if each.is_replicate() else each.dim + missing for each in weight.placements)  # pyrefly: ignore
    return Cut((1,) * missing + tuple(weight.shape), tuple(weight.device_mesh.shape), dims)


@lru_cache(maxsize=256)
def held_by_all(cut: Cut) -> list[Ranges]:
    """What each rank holds."""
    return [cut.held_by(rank) for rank in range(prod(cut.grid))]


@lru_cache(maxsize=8)
def deal(cuts: tuple[Cut, ...]) -> list[list[list[Unit]]]:
    """The units of each round and owner, of matrices that are cut so; first round of all those that do not travel."""
    n_ranks = prod(cuts[0].grid)
    load, largest = [0] * n_ranks, max(prod(cut.shape[1:]) for cut in cuts)
    queues: list[list[tuple[int, Unit]]] = [[] for _ in range(n_ranks)]
    for weight in sorted(range(len(cuts)), key=lambda number: (-prod(cuts[number].shape[1:]), number)):
        cut = cuts[weight]
        for first, last, ranks in _choices(cut):
            owner, size = min(ranks, key=lambda rank: (load[rank], rank)), (last - first) * prod(cut.shape[1:])
            load[owner] += size
            queues[owner].append((size, Unit(weight, first, last, owner, travels=len(ranks) > 1)))
    rounds: list[list[list[Unit]]] = [[[unit for _, unit in queue if not unit.travels] for queue in queues]]
    for owner, queue in enumerate(queues):
        number, filled = 1, 0
        for size, unit in queue:
            if unit.travels:
                number, filled = (number, filled + size) if filled + size <= largest else (number + (filled > 0), size)
                while len(rounds) <= number:
                    rounds.append([[] for _ in range(n_ranks)])
                rounds[number][owner].append(unit)
    return rounds


def _choices(cut: Cut) -> Iterator[tuple[int, int, list[int]]]:
    """Ranges of matrices that are computed together, and the ranks that may: those that have them, or a piece."""
    in_pieces = any(n > 1 and dim in (1, 2) for n, dim in zip(cut.grid, cut.dims, strict=True))
    holders: dict[tuple[int, int], list[int]] = {}
    for rank, (stack, rows, columns) in enumerate(held_by_all(cut)):
        if rows.start < rows.stop and columns.start < columns.stop:
            holders.setdefault((stack.start, stack.stop), []).append(rank)
    for (first, last), ranks in holders.items():
        step = 1 if in_pieces and len(ranks) > 1 else max(last - first, 1)
        yield from ((i, i + step, ranks) for i in range(first, last, step))


@lru_cache(maxsize=8)
def rank_plan(cuts: tuple[Cut, ...], rank: int) -> RankPlan:
    """What `rank` does with matrices that are cut so; all ranks have equally many rounds."""
    alone, *rounds = deal(cuts)
    mine = []
    for owners in rounds:
        sent, got = [], []
        for unit in (unit for units in owners for unit in units):
            cut = cuts[unit.weight]
            held = held_by_all(cut)[rank]
            if (part := unit.within(held)) is not None:
                shift = unit.first - held[0].start
                stack = slice(part[0].start + shift, part[0].stop + shift)
                place = stack, slice(0, held[1].stop - held[1].start), slice(0, held[2].stop - held[2].start)
                got.append((unit.owner, unit.weight, place))
                if cut.copy(unit.owner) == cut.copy(rank):
                    sent.append(got[-1])
        mine.append(Round(sent, [_job(unit, cuts[unit.weight]) for unit in owners[rank]], got))
    return RankPlan(alone[rank], mine)


def _job(unit: Unit, cut: Cut) -> Job:
    parts = [(rank, unit.within(held)) for rank, held in enumerate(held_by_all(cut))]
    holders = [(rank, part) for rank, part in parts if part is not None]
    copy = cut.copy(unit.owner)
    senders = [(rank, part) for rank, part in holders if cut.copy(rank) == copy]
    return Job((unit.last - unit.first, *cut.shape[1:]), senders, holders)


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
    cuts = tuple(map(cut_of, weights))
    assert all(prod(cut.grid) == group.size() for cut in cuts), "the weights lie on other ranks than the group's"
    stacks = [each if each.dim() == 3 else each.unsqueeze(0) for each in slices]
    results = [torch.empty_like(stack) for stack in stacks]
    alone, rounds = rank_plan(cuts, group.rank())
    for weight, *_ in alone:
        results[weight].copy_(function(stacks[weight].to(device)))
    empty = torch.empty(0, dtype=slices[0].dtype, device=device)
    for sent, jobs, got in rounds:
        wholes = [empty.new_empty(job.shape) for job in jobs]
        asked = [(rank, (whole, part)) for whole, job in zip(wholes, jobs, strict=True) for rank, part in job.senders]
        _exchange([(owner, (stacks[weight], part)) for owner, weight, part in sent], asked, empty, group)
        for i, whole in enumerate(wholes):
            wholes[i] = function(whole)
        answers = [(rank, (done, part)) for done, job in zip(wholes, jobs, strict=True) for rank, part in job.holders]
        _exchange(answers, [(owner, (results[weight], part)) for owner, weight, part in got], empty, group)
    return [result.view_as(part) for result, part in zip(results, slices, strict=True)]


def _exchange(
    sent: list[tuple[int, StackPart]], wanted: list[tuple[int, StackPart]], empty: Tensor, group: ProcessGroup
) -> None:
    """Send parts, each to its rank, and put those that arrive where they are wanted, each from its rank.

    Those between two ranks are in the same order on both. What travels has the type and device of `empty`.
    """
    to, of = [0] * group.size(), [0] * group.size()
    for counts, parts in ((to, sent), (of, wanted)):
        parts.sort(key=lambda pair: pair[0])
        for rank, (_, part) in parts:
            counts[rank] += _size(part)
    has_numbers = type(empty) is Tensor
    joined = empty.new_empty(sum(to))
    for piece, place in _pieces(joined, sent) if has_numbers else ():
        piece.copy_(place)
    arrived = functional.wait_tensor(functional.all_to_all_single(joined, of, to, group))
    for piece, place in _pieces(arrived, wanted) if has_numbers else ():
        place.copy_(piece)


def _pieces(flat: Tensor, parts: list[tuple[int, StackPart]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The pieces of `flat` (n,), in which parts lie one behind the other, each with its part, of equal shape."""
    sizes = [_size(part) for _, (_, part) in parts]
    for piece, (_, (stack, part)) in zip(flat.split(sizes), parts, strict=True):
        place = stack[part]
        yield piece.view(place.shape), place


def _size(part: Ranges) -> int:
    return prod(each.stop - each.start for each in part)
