"""Ranks in words."""

from collections.abc import Iterable

from core.config.errors import at_most

MOST_SHOWN = 20
"""So many runs of numbers are named."""


def span(numbers: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    single = len(runs) == 1 and runs[0][0] == runs[0][1]
    return f"rank{'' if single else 's'} {', '.join(at_most(MOST_SHOWN, words))}"
