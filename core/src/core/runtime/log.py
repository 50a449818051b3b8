"""What a run says: plain lines on standard output, warnings marked as such."""

import logging
from contextlib import suppress
from pathlib import Path

from core.config.console import hold_console

LOGGER = logging.getLogger("armature")


class Console(logging.Handler):
    """Prints each message as a line of its own, warnings and errors with their level in front.

    A standard output that somebody put in the place of Python's own may fail: then the line is lost.
    """

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        with suppress(OSError, ValueError):
            print(text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}", flush=True)


def start_logging(*, aloud: bool = True) -> None:
    """Send this project's messages to standard output, once, without touching anybody else's loggers.

    Of several ranks one speaks aloud. From then on no console ends the program.
    """
    hold_console()
    if not LOGGER.handlers:
        LOGGER.addHandler(Console() if aloud else logging.NullHandler())
        LOGGER.setLevel(logging.INFO)
        LOGGER.propagate = False


def log_to(file: Path) -> None:
    """Write this project's messages, with their time, to `file` as well."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOGGER.addHandler(handler)
