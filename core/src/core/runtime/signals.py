"""Signals as requests: to stop after the current step, or to save and go on."""

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What Ctrl-C, schedulers, and a terminal that closes send."""
PYTHON_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Of these the handlers are always replaced; of the others only that of the system, for `nohup` ignores SIGHUP, and
somebody may use one of the rest for a purpose of their own."""


class StopRequest:
    """A flag that these signals raise while the block runs; a second signal ends the process at once.

    That one is left to the system, for Python hears of none while it waits for another rank; but SIGHUP, which a
    terminal that closes sends more than once, does nothing then. A handler only sets flags, because it may run in the
    middle of anything, a print included; `told` says what is to be printed. Outside the main thread, where Python
    delivers no signals, no flag is ever raised.
    """

    def __init__(self, *, saving: signal.Signals | None = None) -> None:
        """`saving` is a signal that asks for a checkpoint instead, as often as it comes."""
        self.saving = saving
        self.signal: signal.Signals | None = None
        self._save_asked = self._told = False
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number in PYTHON_SIGNALS or signal.getsignal(number) is signal.SIG_DFL:
                    self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take_save(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        asked, self._save_asked = self._save_asked, False
        return asked

    def told(self) -> str | None:
        """What to print of a request to stop, once."""
        if self.signal is None or self._told:
            return None
        self._told = True
        return f"{self.signal.name}: stopping after this step (once more to stop at once)"

    def _request(self, number: int, frame: FrameType | None) -> None:
        if number == self.saving:
            self._save_asked = True
            return
        self.signal = signal.Signals(number)
        for each in self._before:
            signal.signal(each, signal.SIG_IGN if each == signal.SIGHUP else signal.SIG_DFL)
