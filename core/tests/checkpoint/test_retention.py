"""Which checkpoints go."""

import math
import random

import pytest

from core.checkpoint.retention import to_remove

STEPS = {10: 3.0, 20: 2.0, 30: None, 40: 2.5, 50: 2.5, 60: None}


@pytest.mark.parametrize(
    "rules, kept",
    [
        ({}, [10, 20, 30, 40, 50, 60]),
        ({"latest": 2}, [50, 60]),
        ({"latest": 1}, [60]),
        ({"latest": 9}, [10, 20, 30, 40, 50, 60]),
        ({"latest": 1, "every": 20}, [20, 40, 60]),
        ({"latest": 1, "best": 1}, [20, 60]),
        ({"latest": 1, "best": 2}, [20, 50, 60]),
        ({"latest": 1, "best": 9}, [10, 20, 40, 50, 60]),
        ({"latest": 1, "pinned": frozenset({10, 70})}, [10, 60]),
        ({"latest": 1, "every": 30, "best": 1, "pinned": frozenset({50})}, [20, 30, 50, 60]),
    ],
)
def test_rules(rules, kept):
    removed = to_remove(STEPS, **{"latest": 0, "every": 0, "best": 0, "pinned": frozenset(), **rules})
    assert sorted(STEPS.keys() - removed) == kept and removed == sorted(removed)


def test_the_newest_stays_and_nothing_is_no_trouble():
    assert to_remove({5: None}, latest=1, every=0, best=0, pinned=frozenset()) == []
    assert to_remove({}, latest=1, every=0, best=0, pinned=frozenset()) == []


def kept_by_counting(
    steps: dict[int, float | None], latest: int, every: int, best: int, pinned: frozenset[int]
) -> set[int]:
    """The steps that stay, each judged by how many others are newer, and how many are better."""
    kept = set()
    for step, loss in steps.items():
        n_newer = len([other for other in steps if other > step])
        is_measured = loss is not None and loss == loss
        n_better = 0
        for other, other_loss in steps.items():
            if is_measured and other_loss is not None and other != step:
                n_better += other_loss < loss or (other_loss == loss and other > step)
        if (
            latest == 0
            or n_newer < max(latest, 1)
            or (every > 0 and step % every == 0)
            or (is_measured and n_better < best)
            or step in pinned
        ):
            kept.add(step)
    return kept


def test_any_rules_keep_what_counting_keeps():
    """NaN, infinities, equal losses and steps without a measurement among them."""
    draw = random.Random(1)
    losses = [None, math.nan, math.inf, -math.inf, 0.0, 1.0, 2.0, 3.0]
    for _ in range(2000):
        numbers = draw.sample(range(1, 40), draw.randrange(0, 12))
        steps = {step: draw.choice(losses) for step in numbers}
        latest, every, best = draw.randrange(4), draw.choice([0, 0, 2, 5]), draw.randrange(5)
        pinned = frozenset(draw.sample(range(1, 40), 2))
        removed = to_remove(steps, latest=latest, every=every, best=best, pinned=pinned)
        assert removed == sorted(set(steps) - kept_by_counting(steps, latest, every, best, pinned)), steps
