"""The parts of a source read and tokenised by several processes, and put in their order.

Each part is read by one process, several parts at a time, and each batch tokenised by another. A process that
tokenises takes the earliest batch that waits. A batch of a later part joins those only if fewer wait than there are
processes, and no earlier part has one ready: so later parts are read ahead as far as it takes to keep all cores busy,
where decompressing takes long, and no further. Their tokens lie in a file until it is their turn; memory holds a few
batches for each process.
"""

import pickle
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from heapq import heappop, heappush
from itertools import chain, count
from pathlib import Path
from threading import Condition, Lock, Thread
from typing import NamedTuple

from core.data.bad_lines import OnBadLine
from core.data.parts import PassCounts, SectionBatch, SourcePart, part_items
from core.data.workers import Encoded, Encoding, PartReading, SectionEncoder, Worker
from core.runtime.cores import n_cores

FEW_BATCHES = 16
"""So many batches are tokenised in this process before it pays to start others."""
_AHEAD = 2
"""Batches that are kept for each process until it is their turn."""


class Tokens(NamedTuple):
    """A batch of a part, and what it was tokenised to."""

    part: int
    batch: SectionBatch
    encoded: Encoded


class PartEnd(NamedTuple):
    """What a part held that was read to its end."""

    part: int
    counts: PassCounts


MergeItem = Tokens | PartEnd


class Reader(NamedTuple):
    """Reads the parts of a source, and tokenises them."""

    parts: Sequence[SourcePart]
    policy: OnBadLine
    encoder: SectionEncoder
    folder: Path
    """Where there is room for tokens whose turn has not come."""

    def items(self, part: int, skip: int, processes: int | None) -> Generator[MergeItem]:
        """The batches of a part behind its first `skip` sections, and of all parts behind it, in order and with their
        tokens, whatever the number of processes; None is one for each core, once there are many batches."""
        n = n_cores() if processes is None else processes
        few = FEW_BATCHES if processes is None else 0
        for number in range(part, len(self.parts)):
            items = part_items(self.parts[number], self.policy, skip)
            for item in items:
                if isinstance(item, PassCounts):
                    yield PartEnd(number, item)
                elif n == 1 or few:
                    yield Tokens(number, item, Encoded.of(self.encoder, item.sections()))
                    skip, few = skip + len(item.opens), few - (n > 1)
                else:
                    yield from _Merge(self, n).items(number, skip, chain([item], items))
                    return
            skip = 0


class _Spilled(NamedTuple):
    """Where an item begins in the file of its part."""

    at: int


class _Merge:
    """What several processes read and tokenise, as it comes to its turn."""

    def __init__(self, reader: Reader, n: int) -> None:
        """`n` processes tokenise."""
        self.parts, self.reader, self.n = reader.parts, reader, n
        self.changed = Condition()
        """Holds all that is below."""
        self.left = deque[tuple[int, int]]()
        """Parts that no process reads yet, and how many sections are passed over."""
        self.waiting: list[tuple[int, int, SectionBatch]] = []
        """Batches to be tokenised: a heap by part and number."""
        self.held = set[int]()
        """Parts that have a batch ready, which is to wait before it waits there."""
        self.found: dict[tuple[int, int], MergeItem | _Spilled | Exception] = {}
        self.kept = 0
        """Batches of them whose tokens are in memory."""
        self.current = 0
        """The part whose turn it is."""
        self.files: dict[int, _File] = {}
        self.stopped = False

    def items(self, first: int, skip: int, begun: Iterator[SectionBatch | PassCounts]) -> Iterator[MergeItem]:
        """As of `Reader`; `begun` is the rest of the first part, for one that does not travel."""
        numbers = range(first, len(self.parts))
        self.left.extend((number, skip * (number == first)) for number in numbers if self.parts[number].travels)
        encoders = [Worker(Encoding(self.reader.encoder)) for _ in range(self.n)]
        readers = [Worker(PartReading(self.reader.policy)) for _ in range(min(self.n, len(self.left)))]
        threads = [Thread(target=self._tokenise, args=(worker,), daemon=True) for worker in encoders]
        threads += [Thread(target=self._read, args=(worker,), daemon=True) for worker in readers]
        try:
            for thread in threads:
                thread.start()
            for number in numbers:
                self._change(lambda number=number: setattr(self, "current", number))
                if self.parts[number].travels:
                    yield from self._read_elsewhere(number)
                else:
                    here = begun if number == first else part_items(self.parts[number], self.reader.policy)
                    yield from self._read_here(number, here)
        finally:
            self._change(lambda: setattr(self, "stopped", True))
            for worker in (*encoders, *readers):
                worker.kill()
            for thread in threads:
                thread.join()
            for worker in (*encoders, *readers):
                worker.close()
            for file in self.files.values():
                file.close()

    def _change(self, how: Callable[[], object]) -> None:
        with self.changed:
            how()
            self.changed.notify_all()

    def _read_elsewhere(self, number: int) -> Iterator[MergeItem]:
        for place in count():
            yield (item := self._take(number, place))
            if isinstance(item, PartEnd):
                break
        if (file := self.files.pop(number, None)) is not None:
            file.close()

    def _read_here(self, number: int, items: Iterator[SectionBatch | PassCounts]) -> Iterator[MergeItem]:
        taken = 0
        for place, item in enumerate(items):
            if isinstance(item, PassCounts):
                self._put(number, place, PartEnd(number, item))
            else:
                self._change(lambda place=place, item=item: heappush(self.waiting, (number, place, item)))
            while place - taken >= _AHEAD * self.n or (isinstance(item, PassCounts) and taken <= place):
                yield self._take(number, taken)
                taken += 1

    def _take(self, number: int, place: int) -> MergeItem:
        """An item when it is there. Raises what kept it from being there."""
        with self.changed:
            self.changed.wait_for(lambda: (number, place) in self.found)
            item = self.found.pop((number, place))
            self.kept -= isinstance(item, Tokens)
            self.changed.notify_all()
        if isinstance(item, Exception):
            raise item
        return self.files[number].read(item) if isinstance(item, _Spilled) else item

    def _put(self, number: int, place: int, item: MergeItem | Exception) -> None:
        """Have an item wait for its turn, in a file where it is of a later part."""
        found: MergeItem | _Spilled | Exception = item
        if isinstance(item, Tokens) and number > self.current:
            try:
                found = self._file(number).write(item)
            except OSError as error:
                found = error
        with self.changed:
            self.found[number, place] = found
            self.kept += isinstance(found, Tokens)
            self.changed.notify_all()

    def _file(self, number: int) -> "_File":
        """The file of a part, which is made when it is first asked for."""
        with self.changed:
            if number not in self.files:
                self.files[number] = _File(self.reader.folder)
            return self.files[number]

    def _read(self, worker: Worker) -> None:
        """Have a process read one part after another."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.stopped or not self.left or self.left[0][0] <= self.current + self.n)
                if self.stopped or not self.left:
                    return
                number, skip = self.left.popleft()
            place = 0
            try:
                for item in worker.answers((self.parts[number], skip)):
                    if isinstance(item, PassCounts):
                        self._put(number, place, PartEnd(number, item))
                    else:
                        self._hand_on(number, place, item)
                    place += 1
            except Exception as error:
                self._put(number, place, error)

    def _hand_on(self, number: int, place: int, batch: SectionBatch) -> None:
        """Have a batch wait to be tokenised, when its part may."""
        with self.changed:
            self.held.add(number)
            self.changed.wait_for(lambda: self.stopped or self._admits(number))
            self.held.discard(number)
            heappush(self.waiting, (number, place, batch))
            self.changed.notify_all()

    def _admits(self, number: int) -> bool:
        room = number > self.current or self.kept < _AHEAD * self.n
        return room and len(self.waiting) < self.n and number == min(self.held)

    def _tokenise(self, worker: Worker) -> None:
        """Have a process tokenise one batch after another."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.stopped or self.waiting)
                if self.stopped:
                    return
                number, place, batch = heappop(self.waiting)
                self.changed.notify_all()
            try:
                (encoded,) = worker.answers(batch)
            except Exception as error:
                self._put(number, place, error)
            else:
                self._put(number, place, Tokens(number, batch.without_texts() if batch.is_whole else batch, encoded))


class _File:
    """Items of a part, in any order."""

    def __init__(self, folder: Path) -> None:
        self._file, self._lock = tempfile.TemporaryFile(dir=folder), Lock()

    def write(self, item: MergeItem | Exception) -> _Spilled:
        with self._lock:
            at = self._file.seek(0, 2)
            pickle.dump(item, self._file)
            return _Spilled(at)

    def read(self, spilled: _Spilled) -> MergeItem:
        with self._lock:
            self._file.seek(spilled.at)
            return pickle.load(self._file)

    def close(self) -> None:
        self._file.close()
