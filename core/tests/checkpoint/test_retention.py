"""Which checkpoints go."""

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
