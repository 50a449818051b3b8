"""One line at the bottom of a terminal that says how far a run is, redrawn in place; what is printed stays above it."""

import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TextIO

from core.runtime.activity import MAIN, Doing, doings
from core.runtime.units import clock

REDRAWS_PER_SECOND = 4
LEAST_BAR, MOST_BAR = 10, 40
GAP = 2
"""Columns between the parts of the line."""
IN_STEP = re.compile(r"step (\d+)")


def can_redraw(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a line may be redrawn: on a terminal that can, whose user has not asked for plain text."""
    plain = bool(environ.get("NO_COLOR")) or environ.get("TERM", "") in ("", "dumb", "unknown")
    return stream.isatty() and not plain


class RunProgress(NamedTuple):
    """How far a run was at a report."""

    step: int
    last_step: int
    remaining_s: float
    fields: list[str]
    """What there is to say of the run, the most important first."""


class Shown(NamedTuple):
    """What the line shows: the share of the run that is done, None where nobody knows, and a text."""

    share: float | None
    bar: int
    """Columns of the bar; 0 for none."""
    text: str


def shown_line(progress: RunProgress | None, doing: Doing, since_s: float, width: int) -> Shown:
    """The line for `width` columns, `since_s` seconds after the report: as many parts as there is room for, and a bar
    in what is left. Before the first report it says what the run is doing, how far that is, and for how long."""
    found = IN_STEP.fullmatch(doing.phase)
    if progress is None:
        first = "the first step, which loads and compiles" if found else doing.phase
        return with_bar(doing.share, [first, *filter(None, [doing.note]), clock(doing.for_s)], width)
    step = int(found[1]) if found else progress.step
    left_s, n_done = progress.remaining_s - since_s, step - 1 - progress.step
    if n_done > 0:  # the first report is of a step that takes longer than others
        left_s = min(left_s, (progress.last_step - step + 1) * since_s / n_done)
    left = f"eta {clock(max(left_s, 0))}"
    parts = [f"step {step}/{progress.last_step}", *([] if found else [doing.phase]), left, *progress.fields]
    return with_bar(step / progress.last_step, parts, width)


def with_bar(share: float | None, parts: Sequence[str], width: int) -> Shown:
    """As many of the parts as `width` columns have room for, and a bar where there is a share and room is left."""
    text = parts[0]
    for part in parts[1:]:
        if len(text) + GAP + len(part) <= width:
            text += f"{'':{GAP}}{part}"
    room = width - len(text) - GAP
    return Shown(share, min(room, MOST_BAR) if share is not None and room >= LEAST_BAR else 0, text[:width])


def line_on(stream: TextIO) -> AbstractContextManager:
    """The line on a stream that can have it, while the block runs."""
    return LiveLine(stream) if can_redraw(stream) else nullcontext()


class LiveLine:
    """The line on a terminal, while the block runs."""

    def __init__(self, stream: TextIO, doing: Callable[[], Doing] = lambda: doings()[MAIN]) -> None:
        from rich.console import Console
        from rich.live import Live

        self._doing = doing
        self._progress: RunProgress | None = None
        self._since = time.monotonic()
        self._terminal = Console(file=stream, force_terminal=True, highlight=False, markup=False, emoji=False)
        self._live = Live(
            console=self._terminal,
            get_renderable=self._drawn,
            refresh_per_second=REDRAWS_PER_SECOND,
            transient=True,
            redirect_stdout=stream is sys.stdout,
            redirect_stderr=stream is sys.stdout and sys.stderr.isatty(),
        )

    def __enter__(self) -> "LiveLine":
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """Print a text above the line."""
        self._terminal.print(text, soft_wrap=True)

    def report(self, progress: RunProgress) -> None:
        """Go on from this report."""
        self._progress, self._since = progress, time.monotonic()

    def _drawn(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = self._terminal.width - 1  # some terminals wrap a line that is full
        shown = shown_line(self._progress, self._doing(), time.monotonic() - self._since, width)
        text = Text(shown.text, no_wrap=True, overflow="crop")
        if shown.share is None or not shown.bar:
            return text
        grid = Table.grid(padding=(0, GAP, 0, 0))
        grid.add_row(ProgressBar(total=1.0, completed=shown.share, width=shown.bar), text)
        return grid
