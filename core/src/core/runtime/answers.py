"""What ranks answer when they are asked what they do, and who of them is waited for."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from core.config.errors import at_most
from core.runtime.activity import MAIN, Doing
from core.runtime.span import span

MOST_ANSWERS = 3
"""What so many ranks do is told."""

Answers = Mapping[int, Mapping[str, Doing]]
"""What the threads of each rank that answered do, by their names."""


class Late(NamedTuple):
    """Ranks that others wait for: those that answered, with what they do, and those that did not."""

    busy: dict[int, Doing]
    mute: set[int]

    @classmethod
    def of(cls, answers: Answers, n_ranks: int, thread: str = MAIN) -> "Late":
        """Who does not wait itself, in the thread of that name or else in its main thread."""
        doing = {rank: threads.get(thread, threads[MAIN]) for rank, threads in answers.items()}
        mute = set(range(n_ranks)) - doing.keys()
        return cls({rank: each for rank, each in sorted(doing.items()) if not each.waits}, mute)

    def __bool__(self) -> bool:
        return bool(self.busy or self.mute)

    @property
    def ranks(self) -> str:
        """Their numbers, in words."""
        return span(self.busy.keys() | self.mute)

    def __str__(self) -> str:
        several = len(self.busy) + len(self.mute) > 1
        parts = [f"{span(self.mute)}: no answer" if several else "no answer"] if self.mute else []
        parts += [f"rank {rank}: {doing}" if several else str(doing) for rank, doing in self.busy.items()]
        return "; ".join(at_most(MOST_ANSWERS, parts))


def encoded(doings: Mapping[str, Doing]) -> dict[str, list[Any]]:
    """What the threads of this rank do, as JSON has it."""
    return {thread: list(doing) for thread, doing in doings.items()}


def decoded(answers: list[dict[str, Any]]) -> dict[int, dict[str, Doing]]:
    """The answers that came."""
    return {each["rank"]: {thread: Doing(*values) for thread, values in each["doings"].items()} for each in answers}
