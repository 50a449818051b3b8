"""Patterns that name weights, and those that name none."""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache

from core.config.errors import at_most, did_you_mean


def pattern_problems(field: str, globs: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Globs that fit none of these names of weights, with the nearest names."""
    lost = [glob for glob in globs if not any(fnmatchcase(name, glob) for name in names)]
    if lost:
        kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
        near = did_you_mean(lost[0], kinds, n=3, cutoff=0.4) or f"there are {', '.join(at_most(3, kinds))}"
        yield field, f"no weight is called {', '.join(lost)}; {near}"


@cache
def fits_any(name: str, globs: tuple[str, ...]) -> bool:
    """Whether a name fits one of these globs, which updates ask of every weight."""
    return any(fnmatchcase(name, glob) for glob in globs)
