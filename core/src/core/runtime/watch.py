"""A thread in every rank: it says what this rank does, hears why a run ends, and ends waits that would have no end.

Ranks tell each other through a `Board`, by messages of three kinds:

    question    every rank answers with what it does (`core.runtime.activity`)
    verdict     why the run ends; the first one holds for all ranks
    end         all ranks have come to the end of the run

A rank that fails writes the verdict. One that has lost another, or waited too long in a step, listens for a verdict
first, and then asks: who does not answer is gone, and who did not wait is the one that was waited for. One that waits
while others save or prepare text asks once a minute, tells whom it waits for, and writes the verdict when that one has
made no progress for too long.
"""

import atexit
import re
import select
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from core.config.errors import LostRank, UserError, at_most
from core.config.exit import LAUNCHER_PATIENCE_S, end_at_once
from core.runtime.activity import MAIN, begin, doings, waiting
from core.runtime.answers import Late, decoded, encoded
from core.runtime.board import Board
from core.runtime.launcher import World
from core.runtime.log import warn_everywhere
from core.runtime.rendezvous import BEAT_S, Rendezvous

ANSWER_S = 5.0
"""In which a process that lives answers."""
GRACE_S = LAUNCHER_PATIENCE_S + 2.0
"""In which the main thread may end by itself after a verdict; it may be inside a call that nothing else ends."""
MOST_REPORT_LINES = 10
"""So many lines of an error are told to the other ranks."""
LOST = re.compile("closed by peer|reset by peer|pair closure|broken pipe|process exited|communicator was aborted", re.I)
"""What gloo and NCCL say in a rank that has lost another."""
TIMED_OUT = re.compile(r"(timed out|timeout) [^\n]*", re.IGNORECASE)
"""What they, and the store, say in one that has waited too long."""


class Verdict(NamedTuple):
    """Why the run ends, the number of the message that says so (0 for none), and when this rank learnt it."""

    text: str
    number: int
    at: float


class Watch:
    """The thread of one rank. Every rank of a run has one, from before they join until all have come to the end."""

    def __init__(self, rendezvous: Rendezvous, world: World, timeout_s: float) -> None:
        """A rank that others wait for may make no progress for `timeout_s`."""
        self.world, self.timeout_s, self.rendezvous = world, timeout_s, rendezvous
        self.verdict: Verdict | None = None
        self._board, self._own = Board(rendezvous.store), Board(rendezvous.connect())
        self._line = rendezvous.place.call()  # nothing is said: it breaks when the store goes
        self._poll_s = min(0.1 + world.size / 1000, 2.0)
        self._beat_s = min(BEAT_S, timeout_s / 3) * (1 + min(world.rank, 59) / 60)  # the first of those that wait asks
        self._stopped, self._over = threading.Event(), threading.Event()
        self._heard = self._end = 0
        self._asked = time.monotonic()
        self._question: tuple[int, float] | None = None
        self._answered = dict.fromkeys(range(world.size), self._asked)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # a thread that is inside torch when Python ends would abort the process

    def leave(self) -> None:
        """Wait until all ranks have come to the end of the run. Raises `LostRank` when one does not."""
        begin("the end of the run")
        if self._board.store.add("at the end", 1) == self.world.size:
            self._board.post(kind="end")
        with waiting():
            self._over.wait()
        if self.verdict is not None:
            raise LostRank(self.verdict.text)

    def explain(self, error: BaseException) -> LostRank | None:
        """What ended this rank, if that was another one; otherwise the others are told that this error did."""
        if isinstance(error, LostRank | GeneratorExit):
            return None
        if not (isinstance(error, RuntimeError) and (LOST.search(str(error)) or TIMED_OUT.search(str(error)))):
            ended = f"rank {self.world.rank} of {self.world.size} ended in {doings()[MAIN].phase}"
            self._decide(f"{ended}: {words(error)}")
            return None
        with waiting():
            if not self._over.wait(LAUNCHER_PATIENCE_S) and (text := self._missing(str(error))):
                self._decide(text)
        return LostRank(self.verdict.text) if self.verdict else None

    def stop(self) -> None:
        """End the thread; where this rank keeps the store, after the others have heard how the run ended."""
        if self.rendezvous.is_kept_here and (number := self.verdict.number if self.verdict else self._end):
            limit = time.monotonic() + LAUNCHER_PATIENCE_S
            while self._board.store.add(f"heard {number}", 0) < self.world.size and time.monotonic() < limit:
                time.sleep(0.02)
        self._stopped.set()
        self._thread.join()
        self._line.close()
        atexit.unregister(self.stop)

    def _decide(self, text: str) -> None:
        """Write a verdict, unless there is one, and wait until the thread has read which came first."""
        if self.verdict is None:
            with suppress(RuntimeError):  # the store is gone, which the thread finds out
                self._board.post(kind="verdict", text=text)
            self._over.wait(ANSWER_S)

    def _missing(self, error: str) -> str:
        """Which ranks are gone, or were waited for; nothing when all answer and none was."""
        number, limit = self._board.post(kind="question"), time.monotonic() + ANSWER_S
        answers = {}
        while len(answers) < self.world.size and time.monotonic() < limit and not self._over.wait(self._poll_s):
            answers = decoded(self._board.answers(number))
        late = Late.of(answers, self.world.size)
        if (waited := TIMED_OUT.search(error)) and late:
            return f"{late.ranks} of {self.world.size} did not come to what others waited for ({late}): {waited[0]}"
        if late.mute:
            ended = "ended without a word: killed, out of memory, or its machine is gone"
            return f"{Late({}, late.mute).ranks} of {self.world.size} {ended}"
        return ""

    def _run(self) -> None:
        """The life of the thread."""
        try:
            while not self._stopped.wait(self._poll_s):
                if select.select([self._line], [], [], 0)[0]:
                    raise ConnectionError
                while message := self._own.read(self._heard + 1):
                    self._heard += 1
                    self._hear(message)
                if self.verdict is None:
                    self._look_after_waits()
                elif time.monotonic() - self.verdict.at > GRACE_S:
                    end_at_once(self.verdict.text)
        except (RuntimeError, OSError):
            gone = f"{self.rendezvous.place.owner} is gone: killed, out of memory, or its machine is"
            verdict = self.verdict or self._settle(gone, 0)
            if not self._stopped.wait(GRACE_S):
                end_at_once(verdict.text)

    def _hear(self, message: dict[str, Any]) -> None:
        if message["kind"] == "question":
            self._asked = time.monotonic()
            self._own.answer(self._heard, rank=self.world.rank, doings=encoded(doings()))
            return
        self._own.store.add(f"heard {self._heard}", 1)
        if message["kind"] == "end":
            self._end = self._heard
            self._over.set()
        elif self.verdict is None:
            self._settle(message["text"], self._heard)

    def _settle(self, text: str, number: int) -> Verdict:
        self.verdict = Verdict(text, number, time.monotonic())
        self._over.set()
        return self.verdict

    def _look_after_waits(self) -> None:
        """Ask what the others do, where a thread has waited for long; judge by the answers."""
        waits = [(doing.for_s, thread) for thread, doing in doings().items() if doing.waits]
        waited_s, thread = max(waits, default=(0.0, MAIN))
        now = time.monotonic()
        if self._question is not None:
            number, limit = self._question
            answers = decoded(self._own.answers(number))
            if len(answers) == self.world.size or now > limit:
                self._question = None
                self._answered |= dict.fromkeys(answers, now)
                if waits:
                    self._judge(Late.of(answers, self.world.size, thread), waited_s)
        elif min(waited_s, now - self._asked) >= self._beat_s:
            self._question = self._own.post(kind="question"), now + ANSWER_S

    def _judge(self, late: Late, waited_s: float) -> None:
        """Tell whom this rank waits for; where one has been silent for too long, or all wait, the run ends."""
        limit = f"comm.save_timeout_seconds is {self.timeout_s:g}"
        silent_s = [doing.quiet_s for doing in late.busy.values()]
        silent_s += [time.monotonic() - self._answered[rank] for rank in late.mute]
        longest_s = min(waited_s, max(silent_s, default=waited_s))
        if longest_s < self.timeout_s:
            if late:
                warn_everywhere(f"waiting for {late.ranks} since {waited_s:.0f} s ({late})", self.world.rank)
            return
        silence = f"{late.ranks} of {self.world.size} made no progress for {longest_s:.0f} s ({late}; {limit})"
        deadlock = f"all {self.world.size} ranks have waited for one another for {waited_s:.0f} s ({limit})"
        self._own.post(kind="verdict", text=silence if late else deadlock)


def words(error: BaseException) -> str:
    """What an error says, for ranks that did not raise it."""
    if isinstance(error, SystemExit):
        return f"exit code {error.code or 0}"
    if isinstance(error, KeyboardInterrupt):
        return "Ctrl-C"
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return "\n".join(at_most(MOST_REPORT_LINES, text.splitlines()))


@contextmanager
def watched(rendezvous: Rendezvous, world: World, timeout_s: float) -> Iterator[None]:
    """Have all ranks, and a `Watch` in each, while the block runs, which they leave together.

    Raises `LostRank` where another rank ended it; what ends this rank is told to the others.
    """
    watch = Watch(rendezvous, world, timeout_s)
    try:
        rendezvous.admit()
        yield
        watch.leave()
    except BaseException as error:
        if lost := watch.explain(error):
            raise lost from error
        raise
    finally:
        watch.stop()
