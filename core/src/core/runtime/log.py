"""What a run says: plain lines on standard output, warnings marked as such."""

import logging

LOGGER = logging.getLogger("armature")


class Console(logging.Handler):
    """Prints each message as a line of its own, warnings and errors with their level in front."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        print(text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}", flush=True)


def start_logging() -> None:
    """Send this project's messages to standard output, once, without touching anybody else's loggers."""
    if not LOGGER.handlers:
        LOGGER.addHandler(Console())
        LOGGER.setLevel(logging.INFO)
        LOGGER.propagate = False
