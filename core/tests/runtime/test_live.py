import io
import logging
import re
import subprocess
import sys

import pytest

from core.runtime import activity
from core.runtime.activity import Doing
from core.runtime.live import LiveLine, RunProgress, can_redraw, shown_line
from core.runtime.log import Console

PROGRESS = RunProgress(100, 400, 754.0, ["loss 5.3847", "1.78k tok/s", "545.01 MiB"])
STEP = Doing("step 112", for_s=1.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "environ, redraws",
    [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({}, False), ({"TERM": "xterm", "NO_COLOR": "1"}, False)],
)
def test_a_line_is_redrawn_where_a_terminal_can_and_may(environ, redraws):
    assert can_redraw(Terminal(), environ) is redraws
    assert not can_redraw(io.StringIO(), environ)


def test_the_line_has_what_there_is_room_for():
    """Hand-written lines; the bar has what is left of the width, if that is enough."""
    whole = "step 112/400  eta 12:04  loss 5.3847  1.78k tok/s  545.01 MiB"
    assert shown_line(PROGRESS, STEP, 30.0, 120) == (0.28, 40, whole)
    assert shown_line(PROGRESS, STEP, 30.0, 80) == (0.28, 80 - len(whole) - 2, whole)
    assert shown_line(PROGRESS, STEP, 30.0, 60) == (0.28, 0, "step 112/400  eta 12:04  loss 5.3847  1.78k tok/s")
    assert shown_line(PROGRESS, STEP, 30.0, 20) == (0.28, 0, "step 112/400")
    assert shown_line(PROGRESS, STEP, 900.0, 5).text == "step "
    assert shown_line(PROGRESS, Doing("validation"), 0.0, 60).text == (
        "step 100/400  validation  eta 12:34  loss 5.3847  545.01 MiB"
    )


def test_the_time_left_follows_steps_that_are_faster_than_those_reported():
    """Four steps in 8 s behind a first one of 4 s: 15 of 2 s are left, not 19 of 4 s; and no more than was reported."""
    first = RunProgress(1, 20, 76.0, [])
    assert shown_line(first, Doing("step 6"), 8.0, 60).text == "step 6/20  eta 0:30"
    assert shown_line(first, Doing("step 2"), 8.0, 60).text == "step 2/20  eta 1:08"
    assert shown_line(first, Doing("step 3"), 8.0, 60).text == "step 3/20  eta 1:08"


def test_before_the_first_report_it_says_what_is_done_for_how_long():
    assert (
        shown_line(None, Doing("step 1", for_s=75.2), 9.0, 80).text == "the first step, which loads and compiles  1:15"
    )
    assert shown_line(None, Doing("a save", for_s=3, note="12 MB"), 0.0, 80).text == "a save  12 MB  0:03"
    reading = Doing("reading tensors", for_s=12, note="1.50 GiB of 6.00 GiB", share=0.25)
    whole = "reading tensors  1.50 GiB of 6.00 GiB  0:12"
    assert shown_line(None, reading, 0.0, 80) == (0.25, 80 - len(whole) - 2, whole)
    assert shown_line(None, reading, 0.0, 30) == (0.25, 0, "reading tensors  0:12")


def test_work_of_known_size_says_how_far_it_is(monkeypatch):
    monkeypatch.setattr(activity, "_phases", {})
    with activity.working("loading weights"):
        notes = [(activity.doings()[activity.MAIN].note, activity.doings()[activity.MAIN].share)]
        for _ in activity.followed(["ab", "cdefgh"], lambda item: len(item) * 2**20):
            notes.append((activity.doings()[activity.MAIN].note, activity.doings()[activity.MAIN].share))
        notes.append((activity.doings()[activity.MAIN].note, activity.doings()[activity.MAIN].share))
    assert notes == [("", None), ("", None), ("2.00 MiB of 8.00 MiB", 0.25), ("8.00 MiB of 8.00 MiB", 1.0)]


def test_messages_stay_above_the_line_and_nothing_of_it_is_left(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", stream := Terminal())
    monkeypatch.setattr(activity, "_phases", {})
    handler, log = Console(), logging.Logger("test", logging.INFO)
    log.addHandler(handler)
    log.info("[bold] a line of a message that is longer than the sixty columns of the terminal is one line")
    with handler.live():
        log.info("step 100", extra={"progress": PROGRESS})
        log.warning("careful")
        print("a line of somebody else")
    log.info("finished")
    screen = shown_on_screen(stream.getvalue())
    assert screen == [
        "[bold] a line of a message that is longer than the sixty columns of the terminal is one line",
        "step 100",
        "warning: careful",
        "a line of somebody else",
        "finished",
    ]
    assert "step 100/400" in stream.getvalue() and "\x1b[?25h" in stream.getvalue()


def shown_on_screen(text: str) -> list[str]:
    """What a terminal shows in the end, of texts that go up, erase lines and write."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|[^\x1b]", text):
        if part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()]


def test_a_run_that_is_piped_loads_no_rich():
    code = "import core.runtime.log, sys; print(any(name.partition('.')[0] == 'rich' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_doing_that_nobody_reports_is_drawn():
    stream = Terminal()
    with LiveLine(stream, lambda: Doing("loading weights", for_s=7)) as line:
        line.say("hello")
    assert "loading weights  0:07" in stream.getvalue()
