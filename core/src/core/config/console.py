"""The console of a program: standard output and standard error that never end it."""

import io
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
"""What torchrun, and srun, call a rank's number, how many there are, and the number on its machine."""


class LossyOutput(io.RawIOBase):
    """A descriptor that takes every byte. What it cannot write is lost; when it can again, it says how much was.

    So a closed pipe, a full disk or a terminal that is gone raises nothing: neither where a line is printed, whoever
    prints it, nor where Python flushes its streams at the end.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._n_lost = descriptor, 0
        self.error: OSError | None = None
        """Why bytes were lost, the last time."""

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        told = f"\n[{self._n_lost:,} bytes are missing here: {self.error}]\n" if self._n_lost else ""
        if self._missing(told.encode()):
            self._n_lost += len(data)
        else:
            self._n_lost = self._missing(data)
        return len(data)

    def _missing(self, data: Any) -> int:
        """Write, and return how many bytes at the end were not taken."""
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # somebody made the pipe a non-blocking one
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.error = error
                break
        return len(left)


def hold_console() -> None:
    """From here on nothing that is printed in this process can fail.

    A character that the encoding lacks is printed as an escape, such as \\u2019. A stream that somebody put in the
    place of Python's own stays, and one that was closed before the program began becomes /dev/null: otherwise the next
    file to be opened would receive what is printed.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):
                stream.flush()
            output = io.BufferedWriter(LossyOutput(stream.fileno()))
            held = io.TextIOWrapper(output, stream.encoding, errors="backslashreplace", line_buffering=True)
            setattr(sys, name, held)


def lost(stream: TextIO) -> OSError | None:
    """Why a stream that is held did not take all that was printed to it; None where it did."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw.error if isinstance(raw, LossyOutput) else None


def tell_user(line: str) -> None:
    """Say on standard error, once for all ranks, what a user must know before there is a log."""
    if all(os.environ.get(size, "1") == "1" or os.environ.get(rank, "0") == "0" for rank, size, _ in LAUNCHERS):
        print(line, file=sys.stderr, flush=True)
