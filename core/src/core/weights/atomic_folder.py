"""A folder that is there whole, or not at all."""

import os
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from core.config.errors import UserError
from core.runtime.disk import flush

CLEANUP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a process at once, unless it listens."""


def vacant(folder: Path) -> Path:
    """The folder where links lead, which must be empty or not exist; raises `UserError` for another one.

    What is whole takes its name in the end, and nothing can take that of a link, or of a disk's place.
    """
    try:
        place = Path(os.path.realpath(folder))
        taken = place.exists() and not (place.is_dir() and not any(place.iterdir()))
        mounted = place.is_mount()
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error
    if taken:
        raise UserError(f"{folder} is there already: choose a folder that is empty or does not exist")
    if mounted:
        raise UserError(f"{folder} is where a disk is mounted: choose a folder in it")
    return place


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its name when the block ends well and its files have reached the disk.

    It is removed when the block ends otherwise, SIGTERM and SIGHUP included. Its name is its own: another process that
    writes the same folder, on another machine or in another container, has another. Raises `UserError` when something
    cannot be written.
    """
    growing = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex[:12]}")
    with _ended_by_exit():
        try:
            growing.mkdir(parents=True)
            yield growing
            flush_all(growing)
            growing.replace(folder)
            flush(folder.parent)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
        finally:
            _ignore_signals()
            shutil.rmtree(growing, ignore_errors=True)


def flush_all(folder: Path) -> None:
    """Let all that lies in a folder reach the disk."""
    for path, _, files in os.walk(folder, topdown=False):
        for name in files:
            flush(os.path.join(path, name))
        flush(path)


@contextmanager
def _ended_by_exit() -> Iterator[None]:
    """End the process by `SystemExit` on these signals while the block runs, so that it can clean up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: handler
        for number in (*CLEANUP_SIGNALS, signal.SIGINT)
        if (handler := signal.getsignal(number)) is not None
    }
    for number in CLEANUP_SIGNALS:
        if before.get(number) is signal.SIG_DFL:
            signal.signal(number, _exit)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _ignore_signals() -> None:
    """From here on nothing interrupts cleaning up."""
    if threading.current_thread() is threading.main_thread():
        for number in (*CLEANUP_SIGNALS, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
