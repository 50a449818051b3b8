"""Ctrl-C and SIGTERM as a request to stop after the current step."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

log = logging.getLogger("armature")

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A flag that SIGINT and SIGTERM raise while the block runs; a second signal ends the process at once.

    That one is left to the system, for Python hears of none while it waits for another rank. Outside the main thread,
    where Python delivers no signals, the flag is never raised.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        log.info(f"{self.signal.name}: stopping after the current step (once more to stop at once)")
