"""Where checkpoints lie: a folder of this machine, or one behind an fsspec URI such as s3://bucket/run."""

import os
import re
import stat
import sys
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from errno import EINVAL, EIO
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, cast

import fsspec
import numpy as np

from core.checkpoint.sums import CRC32, Algorithm, RunningSums, n_threads
from core.config.errors import UserError
from core.runtime.activity import advance
from core.runtime.disk import flush
from core.runtime.units import size_text

CHUNK_BYTES = 2**24
"""Bytes that are read, or written, at a time."""
MUCH = 2**26
"""Bytes that are worth a way to the disk before the file is closed."""
BEHIND = 8
"""So many parts may wait to be summed up."""
SUMMED_BYTES = 2**20
"""Bytes that are read and summed up at a time: they stay near the processor, too."""
PART = 2**17
"""Bytes that are compared at a time: they stay near the processor."""


STEP = re.compile("step-(0|[1-9][0-9]*)")
"""The name of the folder of a checkpoint."""


class NewFile:
    """A file that is being written, and the sums and number of the bytes that went into it.

    Of a file of this machine every part is read back and compared at once; summing up, and the way to the disk, go on
    beside that.
    """

    def __init__(self, stream: IO[bytes], again: BufferedReader | None, summer: Executor, flusher: Executor) -> None:
        """`again` reads the file that `stream` writes, where that can be done already; the executors have one thread
        each."""
        self.stream, self.n_bytes = stream, 0
        self._again, self._summer, self._flusher = again, summer, flusher
        self._found = memoryview(bytearray(PART))
        self._sums, self._summed = RunningSums(), deque[Future[None]]()
        self._flushed, self._flushed_from = cast(Future[None] | None, None), 0

    def write(self, data: bytes | memoryview) -> None:
        """Write bytes that stay as they are until the file is closed."""
        data = memoryview(data).cast("B")
        for at in range(0, len(data), CHUNK_BYTES):
            part = data[at : at + CHUNK_BYTES]
            self._summed.append(self._summer.submit(self._sums.update, part))
            self.stream.write(part)
            self.n_bytes += len(part)
            advance(f"{size_text(self.n_bytes)} written")
            if self._again is not None:
                self.stream.flush()
                self._compare(part, self._again)
                self._begin_flush(self._again)
            if len(self._summed) > BEHIND:
                self._summed.popleft().result()

    def flush(self) -> None:
        """Let what was written reach the disk."""
        if self._flushed is not None:
            self._flushed.result()
        self.stream.flush()
        os.fsync(self.stream.fileno())

    def sums(self) -> str:
        """The sums of a file that is closed."""
        return self._sums.stated()

    def _compare(self, part: memoryview, again: BufferedReader) -> None:
        for at in range(0, len(part), PART):
            written = part[at : at + PART]
            found = self._found[: len(written)]
            whole = again.readinto(found) == len(written)
            if not (whole and np.array_equal(np.frombuffer(found, np.uint8), np.frombuffer(written, np.uint8))):
                raise OSError(EIO, "other bytes are read there than were written")

    def _begin_flush(self, again: BufferedReader) -> None:
        """Have the disk take what it has not yet, where that is much and it is not at it; both streams are one file."""
        if self.n_bytes - self._flushed_from < MUCH or not (self._flushed is None or self._flushed.done()):
            return
        if self._flushed is not None:
            self._flushed.result()
        self._flushed, self._flushed_from = self._flusher.submit(os.fdatasync, again.fileno()), self.n_bytes


class Storage:
    """The files below one place, by names with slashes. Raises `OSError` for whatever the file system below raises."""

    def __init__(self, place: str | Path) -> None:
        """Raises `UserError` where no installed package reaches such a place, or the place does not answer."""
        self.fs, self.root = driver_of(str(place))
        self.is_local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    def __str__(self) -> str:
        return self.root if self.is_local else self.fs.unstrip_protocol(self.root)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def names(self, folder: str = "") -> list[str]:
        """What lies directly in a folder, sorted; nothing where there is no folder."""
        try:
            with self._asked():
                self.fs.invalidate_cache()
                found = self.fs.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def exists(self, name: str) -> bool:
        if self.is_local:
            return os.path.lexists(self.path(name))
        with self._asked():
            self.fs.invalidate_cache()
            return bool(self.fs.exists(self.path(name)))

    def size(self, name: str) -> int:
        """Bytes of a file."""
        with self._asked():
            return int(self.fs.size(self._file(name)))

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        with self._asked():
            return self.fs.cat_file(self._file(name))

    def read_into(self, memory: memoryview, name: str, at: int) -> None:
        """Fill `memory` with the bytes of a file from `at` on. Raises `OSError` where the file ends before."""
        with self._asked(), self.fs.open(self._file(name), "rb") as stream:
            stream.seek(at)
            while memory:
                if not (n_bytes := stream.readinto(memory)):
                    raise OSError(EIO, f"{len(memory):,} bytes are missing at its end", self.path(name))
                memory = memory[n_bytes:]
                advance()

    def sums(self, name: str, algorithm: Algorithm = CRC32) -> str:
        """The sums of a file, as `core.checkpoint.sums` states them; several threads read one of this machine."""
        places = range(0, max(self.size(name), 1), algorithm.stretch_bytes)
        with ThreadPoolExecutor(n_threads() if self.is_local else 1, "summing") as pool:
            return algorithm.stated(list(pool.map(partial(self._stretch, name, algorithm), places)))

    def _stretch(self, name: str, algorithm: Algorithm, at: int) -> bytes:
        """The sum of the stretch of a file that begins at `at`."""
        found, left, memory = algorithm.begin(), algorithm.stretch_bytes, memoryview(bytearray(SUMMED_BYTES))
        with self._asked(), self.fs.open(self._file(name), "rb") as stream:
            stream.seek(at)
            while left and (n_bytes := stream.readinto(memory[:left])):
                found.update(memory[:n_bytes])
                left -= n_bytes
                advance()
        return found.digest()

    def make(self, folder: str) -> None:
        """Make a folder, and those above it, unless they are there."""
        with self._asked():
            self.fs.makedirs(self.path(folder), exist_ok=True)

    @contextmanager
    def create(self, name: str) -> Iterator[NewFile]:
        """A new file; when the block ends it has reached the disk. Raises `OSError` where it reads otherwise."""
        with self._asked(), ExitStack() as exits:
            stream = exits.enter_context(self.fs.open(self.path(name), "wb"))
            again = exits.enter_context(open(self.path(name), "rb")) if self.is_local else None
            summer, flusher = (exits.enter_context(ThreadPoolExecutor(1, name)) for name in ("summing", "flushing"))
            yield (file := NewFile(stream, again, summer, flusher))
            if self.is_local:
                file.flush()
        assert file.n_bytes == self.size(name), name

    def rename(self, old: str, new: str, *, last: str) -> None:
        """Give a folder another name, at once on this machine; elsewhere file by file, the one named `last` at the end.

        There must be nothing under the new name.
        """
        assert not self.exists(new), new
        if self.is_local:
            os.rename(self.path(old), self.path(new))
            flush(self.root)
            return
        with self._asked():
            files = [path[len(self.path(old)) + 1 :] for path in self.fs.find(self.path(old))]
            for file in sorted(files, key=lambda file: (file == last, file)):
                self.fs.mv(self.path(f"{old}/{file}"), self.path(f"{new}/{file}"))
        self.remove(old)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder and all in it, if it is there; of a link the link alone."""
        if self.is_local and os.path.islink(self.path(name)):
            os.unlink(self.path(name))
        elif self.exists(name):
            with self._asked():
                self.fs.rm(self.path(name), recursive=True)

    def check_writable(self) -> None:
        """Write, read, rename and remove a small file, each as a save does. Raises `OSError` where one fails."""
        trial = f".probe-{uuid.uuid4().hex}"
        with ExitStack() as exits:
            for name in (trial, f"{trial}-renamed"):
                exits.callback(self.remove, name)
            self.make(trial)
            with self.create(f"{trial}/file") as file:
                file.write(b"written")
            if self.sums(f"{trial}/file") != file.sums():
                raise OSError(EIO, "other bytes are read there than were written")
            self.flush(trial)
            self.rename(trial, f"{trial}-renamed", last="file")

    def flush(self, folder: str) -> None:
        """Let the names of a folder's files reach the disk."""
        if self.is_local:
            flush(self.path(folder))

    def _file(self, name: str) -> str:
        """The path of a file that is there; raises `OSError` for a pipe, of which reading would wait for a writer."""
        path = self.path(name)
        if self.is_local and not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(EINVAL, "it is no regular file", path)
        return path

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Raise as `OSError` what a driver of a store raises, which may be anything."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            if self.is_local:
                raise
            raise OSError(EIO, one_line(error)) from error


def driver_of(place: str) -> tuple[Any, str]:
    """The driver that reaches a place, and the place in its words; raises `UserError` where none does.

    Each driver has errors of its own. Some that could not be made fail once more when they are deleted (that of ftp in
    fsspec 2026.9), which Python would print with a traceback: here the first failure is told, and the second is not.
    """
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        return fsspec.url_to_fs(place)
    except Exception as error:
        problem = one_line(error)
    finally:
        sys.unraisablehook = hook
    raise UserError(f"nothing here can reach {place}: {problem}")


def seen_from(folder: Path, place: str) -> str:
    """The name of a place below a folder; that of another, on this machine or not, is the place itself."""
    return place.removeprefix(f"{folder.absolute()}/")


def one_line(error: BaseException) -> str:
    """What an error says, with its kind, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def steps_in(storage: Storage) -> list[int]:
    """The steps that a place has checkpoints of, whole or not. Raises `UserError` where one may not look."""
    try:
        names = storage.names()
    except OSError as error:
        raise UserError(f"{storage} cannot be read: {error.strerror or error}") from error
    return sorted(step for name in names if (step := step_of(name)) is not None)


def step_of(folder: str) -> int | None:
    """The step whose checkpoint a folder of this name is; None for any other name."""
    return int(folder.removeprefix("step-")) if STEP.fullmatch(folder) else None
