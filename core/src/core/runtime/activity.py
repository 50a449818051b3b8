"""What this process is doing, phase by phase, for the ranks that wait for it."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from core.runtime.units import size_text

Item = TypeVar("Item")
MAIN = threading.main_thread().name


class Doing(NamedTuple):
    """What a thread does at a moment."""

    phase: str = "the start of the run"
    waits: bool = False
    """For other ranks; otherwise it works."""
    for_s: float = 0.0
    """How long it has been at it."""
    quiet_s: float = 0.0
    """How long it has made no progress."""
    note: str = ""
    """How far it has come."""
    share: float | None = None
    """The share that is done; None where nobody knows."""

    def __str__(self) -> str:
        note = f", {self.note}" if self.note else ""
        quiet = f", without progress for {self.quiet_s:.0f} s" if self.quiet_s < self.for_s - 1 else ""
        return f"{self.phase} for {self.for_s:.0f} s{note}{quiet}"


@dataclass(slots=True)
class _Phase:
    name: str
    waits: bool
    began: float
    moved: float
    note: str = ""
    share: float | None = None


_phases: dict[str, list[_Phase]] = {}
"""The phases that each thread is in, by its name, from outer to inner."""


def begin(name: str) -> None:
    """This thread leaves the phases that it is in, for one that lasts until the next begins."""
    now = time.monotonic()
    _phases[_thread()] = [_Phase(name, False, now, now)]


@contextmanager
def working(name: str) -> Iterator[None]:
    """This thread works on something while the block runs."""
    with _inside(name, waits=False):
        yield


@contextmanager
def waiting() -> Iterator[None]:
    """This thread waits for other ranks while the block runs, in the phase that it is in."""
    stack = _phases.get(_thread())
    with _inside(stack[-1].name if stack else Doing().phase, waits=True):
        yield


def advance(note: str = "", share: float | None = None) -> None:
    """The work of this thread moves on, or that of the main thread where this one is in no phase of its own: a sign of
    life, cheap enough for every few megabytes. `share` of it is done."""
    if stack := _phases.get(_thread()) or _phases.get(MAIN):
        phase = stack[-1]
        phase.moved = time.monotonic()
        phase.note, phase.share = note or phase.note, phase.share if share is None else share


def followed(
    items: Sequence[Item], size: Callable[[Item], int], words: Callable[[int], str] = size_text
) -> Iterator[Item]:
    """The items, while this thread says, in such words, how much of their sizes, which are bytes by
    default, is behind it."""
    total, done = sum(map(size, items)), 0
    for item in items:
        yield item
        done += size(item)
        advance(f"{words(done)} of {words(total)}", done / max(total, 1))


def doings() -> dict[str, Doing]:
    """What each thread does that is in a phase, by its name; the main thread always does something."""
    now = time.monotonic()
    inner = {name: stack[-1] for name, stack in list(_phases.items()) if stack}
    found = {name: Doing(p.name, p.waits, now - p.began, now - p.moved, p.note, p.share) for name, p in inner.items()}
    return {MAIN: Doing(), **found}


@contextmanager
def _inside(name: str, *, waits: bool) -> Iterator[None]:
    now = time.monotonic()
    stack = _phases.setdefault(_thread(), [])
    stack.append(phase := _Phase(name, waits, now, now))
    try:
        yield
    finally:
        if phase in stack:  # nothing began in between
            del stack[stack.index(phase) :]
        if stack:
            stack[-1].moved = time.monotonic()
        else:
            _phases.pop(_thread(), None)


def _thread() -> str:
    return threading.current_thread().name
