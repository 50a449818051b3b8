"""How far long work is, on one line."""

import logging
import shutil
import sys
import time
from collections.abc import Callable

from core.runtime.activity import advance
from core.runtime.live import can_redraw
from core.runtime.log import is_live
from core.runtime.units import clock

log = logging.getLogger("armature")

_LOG_INTERVAL_S = 10.0
_LIVE_INTERVAL_S = 0.2


class ProgressLine:
    """Says how far long work is: one live line on a terminal, that of the run where there is one, otherwise a logged
    line every ten seconds."""

    def __init__(self, name: str, done: Callable[[], float | None] = lambda: None) -> None:
        """`done` says which share of the work is done, None where that is not known."""
        self.name, self._done = name, done
        self.documents = self.bytes = 0
        self._is_said = is_live()
        self._live = self._is_said or can_redraw(sys.stderr)
        self._started = self._said = time.monotonic()
        self._began, self._left = 1.0, ""

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *error: object) -> None:
        if self._live and not self._is_said:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def add(self, documents: int, n_bytes: int) -> None:
        """Count documents and bytes of text as done."""
        self.documents += documents
        self.bytes += n_bytes
        now = time.monotonic()
        megabytes, took_s = self.bytes / 1e6, max(now - self._started, 1e-9)
        note = f"{self.documents:,} documents, {megabytes:,.1f} MB, {megabytes / took_s:.1f} MB/s"
        if now - self._said < (_LIVE_INTERVAL_S if self._live else _LOG_INTERVAL_S):
            return advance(note + self._left)
        self._said = now
        if done := self._done():
            self._began = min(self._began, done)
            if done > self._began:
                self._left = f", {done:.0%}, {clock((1 - done) / (done - self._began) * took_s)} left"
        advance(note + self._left, done)
        line = f"tokenising {self.name}: {note}{self._left}"
        if self._live and not self._is_said:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]}\033[K", end="", file=sys.stderr, flush=True)
        elif not self._live:
            log.info(line)
