"""Sections tokenised by several processes, in their order.

A worker is a program, `main`: it gets an encoder and then batches of sections on its standard input, and answers with
tokens. It is no fork, because the threads of a tokenizer do not survive one, and
no `multiprocessing` either, which would run the user's script again.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from queue import SimpleQueue
from typing import IO, Any, NamedTuple, Protocol, TypeVar

import numpy as np

from core.config.errors import UserError
from core.data.sections import LeftOut, Section
from core.runtime.cores import n_cores

FEW_BATCHES = 16
"""So many batches are tokenised here before it pays to start processes."""
_AHEAD = 2
"""Batches that wait for each process."""
_Job = TypeVar("_Job")


class SectionEncoder(Protocol):
    """What makes tokens of text: a `Tokenizer`, say. It is pickled for other processes."""

    vocab_size: int
    fingerprint: str

    def encode_sections(self, sections: Sequence[Section]) -> Sequence[list[int] | LeftOut]: ...


class Encoded(NamedTuple):
    """The tokens of sections one behind the other, how many each has, and those that have none."""

    ids: np.ndarray
    lengths: np.ndarray
    left_out: dict[int, LeftOut]

    @classmethod
    def of(cls, encoder: SectionEncoder, sections: Sequence[Section]) -> "Encoded":
        """The tokens that an encoder makes of sections."""
        found = encoder.encode_sections(sections)
        left_out = {number: each for number, each in enumerate(found) if isinstance(each, LeftOut)}
        tokens = [each for each in found if not isinstance(each, LeftOut)]
        lengths = np.array([0 if isinstance(each, LeftOut) else len(each) for each in found], np.int64)
        ids = np.fromiter(chain.from_iterable(tokens), np.uint32, count=int(lengths.sum()))
        return cls(ids, lengths, left_out)

    def documents(self) -> list[np.ndarray]:
        """The tokens of each section, (n,) each."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1])


def encoded_in_order(
    encoder: SectionEncoder, jobs: Iterable[_Job], sections_of: Callable[[_Job], list[Section]], processes: int | None
) -> Iterator[tuple[_Job, Encoded]]:
    """Each job with the tokens of its sections, in order, whatever the number of processes; None is one for each core
    once there are many jobs."""
    jobs, few = iter(jobs), processes is None
    n = n_cores() if processes is None else processes
    for number, job in enumerate(jobs, start=1):
        if n > 1 and (not few or number > FEW_BATCHES):
            yield from _by_workers(encoder, chain([job], jobs), sections_of, n)
            return
        yield job, Encoded.of(encoder, sections_of(job))


def _by_workers(
    encoder: SectionEncoder, jobs: Iterable[_Job], sections_of: Callable[[_Job], list[Section]], n: int
) -> Iterator[tuple[_Job, Encoded]]:
    idle: SimpleQueue[_Worker] = SimpleQueue()

    def encode(sections: list[Section]) -> Encoded:
        worker = idle.get()
        try:
            return worker(sections)
        finally:
            idle.put(worker)

    with _started(encoder, n) as workers, ThreadPoolExecutor(n) as threads:
        for worker in workers:
            idle.put(worker)
        waiting: deque[tuple[_Job, Future[Encoded]]] = deque()
        try:
            for job in jobs:
                waiting.append((job, threads.submit(encode, sections_of(job))))
                if len(waiting) >= _AHEAD * n:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


@contextmanager
def _started(encoder: SectionEncoder, n: int) -> Iterator[list["_Worker"]]:
    workers = [_Worker(encoder) for _ in range(n)]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that tokenises; it ends with this one."""

    def __init__(self, encoder: SectionEncoder) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment["TOKENIZERS_PARALLELISM"] = "false"
        command = [sys.executable, "-c", f"from {__name__} import main; main()"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        pickle.dump(encoder, self._input)

    def __call__(self, sections: list[Section]) -> Encoded:
        try:
            pickle.dump(sections, self._input)
            self._input.flush()
            answer: Any = pickle.load(self._output)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            code = self._process.wait()
            raise UserError(
                f"a process that tokenises ended with code {code}, out of memory perhaps: try fewer, with processes 1"
            ) from error
        if isinstance(answer, UserError):
            raise answer
        return answer

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._input, self._output):
            try:
                stream.close()
            except OSError:
                pass  # what was not sent any more


def work(given: IO[bytes], answers: IO[bytes]) -> None:
    """Tokenise batches of sections until there are no more."""
    encoder: SectionEncoder = pickle.load(given)
    while True:
        try:
            sections = pickle.load(given)
        except EOFError:
            return
        try:
            answer: Any = Encoded.of(encoder, sections)
        except UserError as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()


def main() -> None:
    """The program of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; who started this one ends it
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    work(sys.stdin.buffer, answers)
