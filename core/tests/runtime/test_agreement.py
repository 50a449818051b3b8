"""Facts that ranks must have in common: what is said where they have not, and that all say the same."""

from datetime import timedelta

import pytest
import torch.distributed as dist

from core.config.errors import UserError
from core.runtime import agreement
from core.runtime.agreement import MOST_DIFFERING_LINES, check_agreement, differing
from core.runtime.ranks import Ranks
from core.runtime.span import MOST_SHOWN, span
from core.testing.ranks import run_ranks


@pytest.mark.parametrize(
    ("numbers", "words"),
    [([3], "rank 3"), ([0, 1], "ranks 0-1"), ([5, 0, 2, 1], "ranks 0-2, 5"), ([0, 2, 4], "ranks 0, 2, 4")],
)
def test_ranks_are_named_in_runs(numbers, words):
    assert span(numbers) == words


def test_of_many_ranks_without_order_some_are_named():
    assert span(range(0, 4000, 2)).endswith(f", {2 * MOST_SHOWN - 2}, and {2000 - MOST_SHOWN} more")


def test_only_what_differs_is_listed_with_every_value():
    kinds = [
        ([0, 2, 3], {"lr": "0.1", "seed": "1", "old": "x"}),
        ([1], {"lr": "0.2", "seed": "1", "new": "y" * 200}),
        ([4], {"lr": "0.1", "seed": "2", "old": "x"}),
    ]
    assert differing(kinds) == [
        "lr: 0.1 (ranks 0, 2-4), 0.2 (rank 1)",
        "seed: 1 (ranks 0-3), 2 (rank 4)",
        "old: x (ranks 0, 2-4), missing (rank 1)",
        f"new: missing (ranks 0, 2-4), {'y' * 117}... (rank 1)",
    ]
    many = [([rank], {f"fact {i}": str(rank) for i in range(100)}) for rank in (0, 1)]
    assert differing(many)[-1] == f"and {100 - MOST_DIFFERING_LINES} more"


def test_a_process_alone_agrees_with_itself_and_learns_nothing():
    check_agreement(lambda: pytest.fail("asked"), Ranks())


def asked(facts: list[dict[str, str]], n_kinds: int) -> list[str]:
    """What this rank is told of its facts, of none that differ, and of its facts again."""
    agreement.MOST_KINDS = n_kinds
    texts = []
    ranks = Ranks.patient(timedelta(seconds=60))
    for mine in (facts[dist.get_rank()], {"seed": "1"}, facts[dist.get_rank()]):
        try:
            check_agreement(lambda mine=mine: mine, ranks)
            texts.append("agreed")
        except UserError as error:
            texts.append(str(error))
    return texts


def test_every_rank_is_told_the_same_and_may_go_on():
    said = run_ranks(asked, 3, [{"seed": "1", "lr": "2"}, {"seed": "1", "lr": "3"}, {"lr": "2", "seed": "1"}], 8)
    first, second, third = said[0]
    assert said == [said[0]] * 3 and second == "agreed" and first == third
    assert first.splitlines() == [
        "the ranks of this run do not agree:",
        "  lr: 2 (ranks 0, 2), 3 (rank 1)",
        "start all of them with the same command, the same packages and code, and the same text",
    ]


def test_where_no_two_ranks_agree_some_speak_for_all():
    (first, *others) = run_ranks(asked, 4, [{"lr": str(rank)} for rank in range(4)], 2)
    assert others == [first] * 3
    assert first[0].splitlines()[1:3] == ["  lr: 0 (rank 0), 1 (rank 1)", "  and ranks 2-3 differ in other ways"]
