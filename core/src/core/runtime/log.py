"""What a run says: plain lines on standard output, warnings marked as such."""

import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from core.config.console import hold_console
from core.runtime.disk import AppendedFile
from core.runtime.live import LiveLine, can_redraw

log = logging.getLogger("armature")
WIDTH = 60
"""Columns that a line for people has at most, as far as names of files allow."""


class Console(logging.Handler):
    """Prints each message as a line of its own, warnings and errors with their level in front.

    A message that was logged with `extra={"fields": [...]}`, its parts, is several lines on a terminal that it is too
    long for, and one line everywhere else: a program that reads it finds all of it there. A standard output that
    somebody put in the place of Python's own may fail: then the line is lost.

    Inside `live`, on a terminal that can redraw a line, there is one below all messages that says how far the run is; a
    message with `extra={"progress": RunProgress(...)}` moves it on.
    """

    _line: LiveLine | None = None

    @property
    def is_live(self) -> bool:
        """Whether the line is shown."""
        return self._line is not None

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show the line while the block runs."""
        if not can_redraw(sys.stdout):
            yield
            return
        with LiveLine(sys.stdout) as self._line:
            try:
                yield
            finally:
                self._line = None

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        fields = getattr(record, "fields", None)
        with suppress(OSError, ValueError):
            if fields is not None and sys.stdout.isatty():
                text = in_columns(fields, shutil.get_terminal_size().columns)
            text = text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"
            if self._line is None:
                print(text, flush=True)
                return
            if (progress := getattr(record, "progress", None)) is not None:
                self._line.report(progress)
            self._line.say(text)


def in_columns(fields: Sequence[str], width: int) -> str:
    """The fields, two spaces apart, in lines of at most `width` columns as far as single fields allow; the second line
    and later ones are indented."""
    lines: list[str] = []
    for field in fields:
        if lines and len(lines[-1]) + 2 + len(field) <= width:
            lines[-1] += f"  {field}"
        else:
            lines.append(f"    {field}" if lines else field)
    return "\n".join(lines)


def start_logging(*, aloud: bool = True) -> None:
    """Send this project's messages to standard output, once, without touching anybody else's loggers.

    Of several ranks one speaks aloud. From then on no console ends the program.
    """
    hold_console()
    if not log.handlers:
        log.addHandler(Console() if aloud else logging.NullHandler())
        log.setLevel(logging.INFO)
        log.propagate = False


@contextmanager
def live_line() -> Iterator[None]:
    """Show how far the run is, where this process speaks and its terminal can, while the block runs."""
    with ExitStack() as shown:
        for handler in log.handlers:
            if isinstance(handler, Console):
                shown.enter_context(handler.live())
        yield


def is_live() -> bool:
    """Whether such a line is shown at this moment: what says how far it is needs no line of its own."""
    return any(isinstance(handler, Console) and handler.is_live for handler in log.handlers)


class LogFile(logging.Handler):
    """Appends each message as a line to a file; what the disk does not take ends nothing."""

    def __init__(self, file: AppendedFile) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        self._file.append(self.format(record).encode(errors="backslashreplace") + b"\n")


def event(name: str, step: int, **facts: Any) -> dict[str, Any]:
    """What makes a message an event of a run, as its `extra`: a name, the step, and facts that JSON can hold; a `text`
    among them stands for the message's."""
    return {"event": {"event": name, "step": step, **facts}}


class EventLog(logging.Handler):
    """Appends each message that is an event as a line of JSON to a file; what the disk does not take ends nothing."""

    def __init__(self, file: AppendedFile) -> None:
        super().__init__()
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        if (facts := getattr(record, "event", None)) is not None:
            line = {"time": time.time(), "text": self.format(record), **facts}
            self._file.append(json.dumps(line).encode() + b"\n")


@contextmanager
def events_to(path: Path) -> Iterator[None]:
    """Write the events among this project's messages to a file, which the first makes, while the block runs."""
    with _handled(EventLog(file := AppendedFile(path)), file):
        yield


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Write this project's messages, with their time, to a file as well, while the block runs.

    Raises `OSError` where it cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = AppendedFile(path)
    file.create()
    with _handled(LogFile(file), file):
        yield


@contextmanager
def _handled(handler: logging.Handler, file: AppendedFile) -> Iterator[None]:
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        file.close()


def warn_everywhere(text: str, rank: int) -> None:
    """Warn of something that concerns all ranks; also aloud on a rank that is silent otherwise."""
    log.warning(text)
    if rank > 0:
        print(f"warning (rank {rank}): {text}", file=sys.stderr, flush=True)
