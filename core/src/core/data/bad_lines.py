"""What is done where data cannot be read."""

import logging
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from core.config.errors import UserError

log = logging.getLogger("armature")

OnBadLine = Literal["error", "skip"]


class BadLines:
    """What cannot be read: the first is an error, or all are left out and counted."""

    def __init__(self, policy: OnBadLine, count: int = 0, first: str = "") -> None:
        """So many were reported before."""
        self.policy, self.count, self.first = policy, count, first

    def add(self, place: str, reason: str) -> None:
        """Report what stands at `place` ("file:line"); raises UserError unless the policy is "skip"."""
        if self.policy == "error":
            raise UserError(f"{place}: {reason}. Fix the data, or leave such lines out with on_bad_line skip")
        self.first = self.first or f"{place}: {reason}"
        self.count += 1

    def summarise(self, name: str, what: str = "unreadable lines") -> None:
        """Log how many were left out, if any."""
        if self.count:
            log.warning("%s: left out %s %s; the first: %s", name, f"{self.count:,}", what, self.first)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """What keeps files from being read, told in one line."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
