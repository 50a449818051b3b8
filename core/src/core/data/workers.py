"""Processes that read the parts of a source, and that tokenise what is read.

Each is a program, `main`, which gets what it works with and then one piece of work after another on its standard input.
It is no fork, because the threads of a tokenizer do not survive one, and no `multiprocessing` either, which would run
the user's script again.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import IO, Any, NamedTuple, Protocol

import numpy as np

from core.config.errors import UserError
from core.data.bad_lines import OnBadLine
from core.data.parts import PassCounts, SectionBatch, SourcePart, part_items
from core.data.sections import LeftOut, Section


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


class Work(Protocol):
    """What a process does: answers to one piece of work after another. It is pickled for that process."""

    name: str

    def answers(self, given: Any) -> Iterator[Any]: ...


class Encoding:
    """Batches become `Encoded`."""

    name = "tokenises"

    def __init__(self, encoder: SectionEncoder) -> None:
        self.encoder = encoder

    def answers(self, given: SectionBatch) -> Iterator[Encoded]:
        yield Encoded.of(self.encoder, given.sections())


class PartReading:
    """A part, of which some sections are passed over, becomes batches, and what was found in it."""

    name = "reads text"

    def __init__(self, policy: OnBadLine) -> None:
        self.policy = policy

    def answers(self, given: tuple[SourcePart, int]) -> Iterator[SectionBatch | PassCounts]:
        part, skip = given
        yield from part_items(part, self.policy, skip)


class Worker:
    """A process that works for this one, and ends with it."""

    def __init__(self, work: Work) -> None:
        self._name = work.name
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment["TOKENIZERS_PARALLELISM"] = "false"
        command = [sys.executable, "-c", f"from {__name__} import main; main()"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self._work = work
        self._begun = False

    def answers(self, given: Any) -> Iterator[Any]:
        """What it answers to a piece of work. Raises `UserError` as the work does, and where the process ends."""
        try:
            if not self._begun:
                self._begun = True
                pickle.dump(self._work, self._input)
            pickle.dump(given, self._input)
            self._input.flush()
            while True:
                answer = pickle.load(self._output)
                if answer is None:
                    return
                if isinstance(answer, UserError):
                    raise answer
                yield answer
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            code = self._process.wait()
            raise UserError(
                f"a process that {self._name} ended with code {code}, out of memory perhaps: try fewer, with "
                "processes 1"
            ) from error

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Close what leads to it, once nobody waits there."""
        for stream in (self._input, self._output):
            try:
                stream.close()
            except OSError:
                pass  # what was not sent any more


def answer_all(given: IO[bytes], answers: IO[bytes]) -> None:
    """Work until there is no more; None ends the answers to each piece."""
    work: Work = pickle.load(given)
    while True:
        try:
            piece = pickle.load(given)
        except EOFError:
            return
        try:
            for answer in work.answers(piece):
                pickle.dump(answer, answers)
                answers.flush()
            answer: Any = None
        except UserError as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()


def main() -> None:
    """The program of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; who started this one ends it
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    answer_all(sys.stdin.buffer, answers)
