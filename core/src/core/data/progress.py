"""How far long work is, on one line."""

import logging
import shutil
import sys
import time
from collections.abc import Callable

from core.runtime.activity import advance
from core.runtime.live import can_redraw
from core.runtime.units import clock

log = logging.getLogger("armature")

_LOG_INTERVAL_S = 10.0
_LIVE_INTERVAL_S = 0.2


class ProgressLine:
    """Says how far long work is: one live line on a terminal, otherwise a logged line every ten seconds."""

    def __init__(self, name: str, done: Callable[[], float | None] = lambda: None) -> None:
        """`done` says which share of the work is done, None where that is not known."""
        self.name, self._done = name, done
        self.documents = self.bytes = 0
        self._live = can_redraw(sys.stderr)
        self._started = self._said = time.monotonic()
        self._began = 1.0

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def add(self, documents: int, n_bytes: int) -> None:
        """Count documents and bytes of text as done."""
        self.documents += documents
        self.bytes += n_bytes
        advance(f"{self.bytes / 1e6:,.1f} MB of text done")
        now = time.monotonic()
        if now - self._said < (_LIVE_INTERVAL_S if self._live else _LOG_INTERVAL_S):
            return
        self._said = now
        megabytes, took_s = self.bytes / 1e6, now - self._started
        line = f"tokenising {self.name}: {self.documents:,} documents, {megabytes:,.1f} MB, "
        line += f"{megabytes / took_s:.1f} MB/s"
        if done := self._done():
            self._began = min(self._began, done)
            if done > self._began:
                line += f", {done:.0%}, {clock((1 - done) / (done - self._began) * took_s)} left"
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]}\033[K", end="", file=sys.stderr, flush=True)
        else:
            log.info(line)
