"""Where checkpoints lie: a folder of this machine, or one behind an fsspec URI such as s3://bucket/run."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EIO
from pathlib import Path
from typing import IO, Any

import fsspec

from core.config.errors import UserError

CHUNK = 2**24
"""Bytes that are read at a time."""


class Digest:
    """A file that is being written, and the SHA-256 and number of the bytes that went into it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.n_bytes, self._hash = stream, 0, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self.stream.write(data)
        self._hash.update(data)
        self.n_bytes += memoryview(data).nbytes

    def hex(self) -> str:
        return self._hash.hexdigest()


class Storage:
    """The files below one place, by names with slashes. Raises `OSError` as the file system below does."""

    def __init__(self, place: str | Path) -> None:
        try:
            self.fs, self.root = fsspec.url_to_fs(str(place))
        except (ImportError, ValueError) as error:
            raise UserError(f"nothing here can reach {place}: {error}") from error
        self.is_local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    def __str__(self) -> str:
        return self.root if self.is_local else self.fs.unstrip_protocol(self.root)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def names(self, folder: str = "") -> list[str]:
        """What lies directly in a folder, sorted; nothing where there is no folder."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def exists(self, name: str) -> bool:
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.path(name)))

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return int(self.fs.size(self.path(name)))

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        return self.fs.cat_file(self.path(name))

    def read_into(self, memory: memoryview, name: str, at: int) -> None:
        """Fill `memory` with the bytes of a file from `at` on. Raises `OSError` where the file ends before."""
        with self.fs.open(self.path(name), "rb") as stream:
            stream.seek(at)
            while memory:
                if not (n_bytes := stream.readinto(memory)):
                    raise OSError(EIO, f"{len(memory):,} bytes are missing at its end", self.path(name))
                memory = memory[n_bytes:]

    def digest(self, name: str) -> str:
        """The SHA-256 of a file."""
        found = hashlib.sha256()
        with self.fs.open(self.path(name), "rb") as stream:
            while data := stream.read(CHUNK):
                found.update(data)
        return found.hexdigest()

    def make(self, folder: str) -> None:
        """Make a folder, and those above it, unless they are there."""
        self.fs.makedirs(self.path(folder), exist_ok=True)

    @contextmanager
    def create(self, name: str) -> Iterator[Digest]:
        """A new file; when the block ends it has reached the disk."""
        with self.fs.open(self.path(name), "wb") as stream:
            yield (digest := Digest(stream))
            if self.is_local:
                stream.flush()
                os.fsync(stream.fileno())
        assert digest.n_bytes == self.size(name), name

    def rename(self, old: str, new: str, *, last: str) -> None:
        """Give a folder another name, at once on this machine; elsewhere file by file, the one named `last` at the end.

        There must be nothing under the new name.
        """
        assert not self.exists(new), new
        if self.is_local:
            os.rename(self.path(old), self.path(new))
            self._flush(self.root)
            return
        files = [path[len(self.path(old)) + 1 :] for path in self.fs.find(self.path(old))]
        for file in sorted(files, key=lambda file: (file == last, file)):
            self.fs.mv(self.path(f"{old}/{file}"), self.path(f"{new}/{file}"))
        self.remove(old)

    def remove(self, folder: str) -> None:
        """Remove a folder and all in it, if it is there."""
        if self.exists(folder):
            self.fs.rm(self.path(folder), recursive=True)

    def flush(self, folder: str) -> None:
        """Let the names of a folder's files reach the disk."""
        if self.is_local:
            self._flush(self.path(folder))

    def _flush(self, folder: Any) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def steps_in(storage: Storage) -> list[int]:
    """The steps that a place has checkpoints of, whole or not. Raises `UserError` where one may not look."""
    try:
        names = storage.names()
    except OSError as error:
        raise UserError(f"{storage} cannot be read: {error.strerror or error}") from error
    numbers = (name.removeprefix("step-") for name in names if name.startswith("step-"))
    return sorted(int(number) for number in numbers if number.isdecimal())
