"""A disk that fails when it is told to: every way in which Python writes below a folder is a point where it may."""

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Point(NamedTuple):
    """A moment at which the disk may fail: its number from 1, the call, and the file."""

    number: int
    call: str
    path: str


class Stream:
    """A file whose every write, change of size, way to the disk and end is a point."""

    def __init__(self, stream: Any, path: str, at: Callable[[str, str], None]) -> None:
        self._stream, self._path, self._at = stream, path, at

    def write(self, data: Any) -> int:
        try:
            self._at("write", self._path)
        except OSError:
            self._stream.write(data[: len(data) // 2])
            raise
        return self._stream.write(data)

    def flush(self) -> None:
        self._at("flush", self._path)
        self._stream.flush()

    def close(self) -> None:
        if not self._stream.closed:
            self._stream.close()
            self._at("close", self._path)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def watched_disk(folder: Path, fails: Callable[[Point], OSError | None]) -> Iterator[list[Point]]:
    """Ask `fails` at every point below `folder` while the block runs, and raise what it returns. Yields the points."""
    points: list[Point] = []
    home = f"{folder}/"

    def at(call: str, path: str) -> None:
        if f"{path}/".startswith(home):
            points.append(Point(len(points) + 1, call, path.removeprefix(home)))
            if (error := fails(points[-1])) is not None:
                raise error

    def open_file(file: Any, mode: str = "r", *args: Any, **settings: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.path.abspath(os.fspath(file))
        if not f"{path}/".startswith(home) or not set(mode) & set("wax+"):
            return plain["open"](file, mode, *args, **settings)
        at("open", path)
        return Stream(plain["open"](file, mode, *args, **settings), path, at)

    def of_path(name: str) -> Callable:
        def call(path: Any, *args: Any, **settings: Any) -> Any:
            if name != "open" or args[0] & WRITES:
                at(name, os.path.abspath(os.fspath(path)))
            return plain[f"os.{name}"](path, *args, **settings)

        return call

    def of_descriptor(name: str) -> Callable:
        def call(descriptor: int, *args: Any) -> Any:
            at(name, os.readlink(f"/proc/self/fd/{descriptor}"))
            return plain[f"os.{name}"](descriptor, *args)

        return call

    def trace(profile: Any, file: str) -> None:
        try:
            at("trace", file)
        except OSError:  # says nothing, and leaves what it has
            Path(f"{file}.tmp").touch()
        else:
            plain["trace"](profile, file)

    plain: dict[str, Any] = {"open": builtins.open, "trace": torch.profiler.profile.export_chrome_trace}
    paths, descriptors = ("open", "mkdir", "rename", "replace", "unlink"), ("write", "sendfile", "ftruncate", "fsync")
    plain |= {f"os.{name}": getattr(os, name) for name in (*paths, *descriptors)}
    with (
        mock.patch.object(builtins, "open", open_file),
        mock.patch.object(io, "open", open_file),
        mock.patch.object(torch.profiler.profile, "export_chrome_trace", trace),
        mock.patch.multiple(os, **{name: of_path(name) for name in paths}),
        mock.patch.multiple(os, **{name: of_descriptor(name) for name in descriptors}),
    ):
        yield points
