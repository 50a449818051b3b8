"""What must be the same on every rank, compared before anything relies on it."""

import hashlib
import json
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from core.config.errors import UserError, at_most
from core.runtime.activity import waiting
from core.runtime.ranks import Ranks
from core.runtime.span import span

MOST_DIFFERING_LINES = 20
"""So many facts that differ are listed."""
MOST_KINDS = 8
"""The facts of so many ranks, no two of which agree in all, are sent around."""
DIFFERENCE_WIDTH = 120
"""Longest value that is shown whole."""


def check_agreement(learn: Callable[[], Mapping[str, str]], ranks: Ranks) -> None:
    """Raise one `UserError`, the same on every rank, where the facts that each learns by name differ between ranks: it
    lists these facts, each value, and the ranks that have it.

    A collective. Where all agree it costs one sum of 128 bytes. Otherwise every rank receives the hash of every other,
    64 bytes each, and the facts of at most `MOST_KINDS` ranks.
    """
    if ranks.group is None:
        return
    facts = dict(learn())
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()
    mine = torch.frombuffer(bytearray(digest), dtype=torch.int32).long()
    extremes = torch.cat([mine, -mine])
    with waiting():
        dist.all_reduce(extremes, dist.ReduceOp.MIN, group=ranks.group)
    if torch.equal(extremes[:8], -extremes[8:]):
        return
    digests = torch.zeros(ranks.size, len(mine), dtype=mine.dtype)
    digests[ranks.rank] = mine
    dist.all_reduce(digests, group=ranks.group)
    members: dict[tuple[int, ...], list[int]] = {}
    for rank, each in enumerate(digests.tolist()):
        members.setdefault(tuple(each), []).append(rank)
    kinds = []
    for numbers in list(members.values())[:MOST_KINDS]:
        said = [facts if ranks.rank == numbers[0] else None]
        dist.broadcast_object_list(said, src=numbers[0], group=ranks.group)
        kinds.append((numbers, said[0] or {}))
    others = [rank for numbers in list(members.values())[MOST_KINDS:] for rank in numbers]
    raise UserError(
        "\n  ".join(["the ranks of this run do not agree:", *differing(kinds), *_rest(others)])
        + "\nstart all of them with the same command, the same packages and code, and the same text"
    )


def differing(kinds: list[tuple[list[int], dict[str, str]]]) -> list[str]:
    """A line for each fact that ranks differ in; a kind is the ranks that have the same facts, and these."""
    lines = []
    for name in dict.fromkeys(name for _, facts in kinds for name in facts):
        ranks_of: dict[str, list[int]] = {}
        for numbers, facts in kinds:
            ranks_of.setdefault(facts.get(name, "missing"), []).extend(numbers)
        if len(ranks_of) > 1:
            values = [f"{_short(value)} ({span(numbers)})" for value, numbers in ranks_of.items()]
            lines.append(f"{name}: {', '.join(values)}")
    return at_most(MOST_DIFFERING_LINES, lines)


def _rest(ranks: list[int]) -> list[str]:
    return [f"and {span(ranks)} differ in other ways"] if ranks else []


def _short(value: str) -> str:
    return value if len(value) <= DIFFERENCE_WIDTH else f"{value[: DIFFERENCE_WIDTH - 3]}..."
