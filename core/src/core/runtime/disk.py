"""What a run writes beside its checkpoints, on a disk that may be full, read-only, or not there for a while.

Before the first step a file that cannot be written is an error (`needed`). Afterwards nothing of this kind ends a run:
it is a warning (`OptionalFile`), and a file that grows catches up when the disk takes it (`AppendedFile`).
"""

import logging
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EBADF, EINVAL
from pathlib import Path

from core.config.errors import UserError

log = logging.getLogger("armature")

MOST_WAITING = 10_000
"""So many records of one file wait for the disk."""


@contextmanager
def needed(place: str | Path, fix: str) -> Iterator[None]:
    """Raise `UserError` where something in the block, which writes in `place`, cannot be written; `fix` says what to
    do."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write in {place}: {error.strerror or error}; {fix}") from error


class OptionalFile:
    """What a run can do without. What keeps it from being written is a warning, once for each cause until it is written
    again, which is told as well."""

    def __init__(self, name: str | Path) -> None:
        self.name = name
        self._told: set[int | None] = set()

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """End the block, and nothing else, where something in it cannot be written."""
        try:
            yield
        except OSError as error:
            if error.errno not in self._told:
                self._told.add(error.errno)
                log.warning(f"{self.name} cannot be written: {error.strerror or error}; the run goes on without it")
        else:
            if self._told:
                self._told.clear()
                log.info(f"{self.name} is written again")


class AppendedFile:
    """A file that grows by whole records and is opened for each, so that it may also be moved away or removed.

    A record that the disk does not take waits in memory and is written before the next one; of more than `MOST_WAITING`
    the oldest are lost. None is left torn, unless the process is killed in the middle of it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path.absolute(), OptionalFile(path)
        self._waiting, self._n_lost = deque[bytes](), 0
        self._end: int | None = None
        """Where the file ended before an attempt that failed, and may have left something behind that."""

    def create(self, first: bytes = b"") -> None:
        """Make the file, unless it is there, and append a first record. Raises `OSError` where that cannot be done."""
        self._write(first)

    def append(self, *records: bytes) -> None:
        """Write these records, after those that waited."""
        self._waiting.extend(records)
        with self._file.attempt():
            self._write(b"".join(self._waiting))
            self._waiting.clear()
        while len(self._waiting) > MOST_WAITING:
            self._waiting.popleft()
            self._n_lost += 1

    def close(self) -> None:
        """Write what waited, and tell what is missing."""
        if self._waiting:
            self.append()
        if n_missing := self._n_lost + len(self._waiting):
            log.warning(f"{n_missing:,} records are missing in {self._file.name}")

    def _write(self, data: bytes) -> None:
        with self._path.open("ab", buffering=0) as stream:
            end = stream.seek(0, os.SEEK_END)
            if self._end is not None and end > self._end:
                end = stream.truncate(self._end)
            self._end = end
            try:
                while data:
                    data = data[stream.write(data) :]
            except OSError:
                with suppress(OSError):
                    stream.truncate(end)
                raise
        self._end = None


def replace_file(path: Path, data: bytes) -> None:
    """Give a file new content: whenever the process or the machine ends, the file is there whole, as it was or as it
    will be. One process at a time may do so. Raises `OSError` where that cannot be written."""
    growing = path.with_name(f".{path.name}.growing")
    growing.unlink(missing_ok=True)  # of a process that was killed; or a link
    try:
        with growing.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        growing.replace(path)
    except BaseException:
        with suppress(OSError):
            growing.unlink()
        raise
    flush(path.parent)


def flush(path: str | Path) -> None:
    """Let a file, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (EBADF, EINVAL):  # a file system that does not flush folders
            raise
    finally:
        os.close(descriptor)
