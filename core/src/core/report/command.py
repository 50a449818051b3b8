"""The command line of reports: python -m core.report."""

import argparse
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from core.config.completion import ANY, SHELLS, Program, Taken, script
from core.config.errors import UserError
from core.config.exit import exit_plainly
from core.config.help import PRINT_COMPLETION, show
from core.report.comparison import diff_text, leaderboard
from core.report.page import page_data, page_text
from core.report.run_folder import RunFolder, found_runs
from core.report.server import Feed, ReportServer

PORT = 8470
REPORT_PROGRAM = Program(
    Taken(most=ANY, files=True),
    {
        "--out": Taken(files=True),
        "--serve": Taken(most=0),
        "--port": Taken(),
        "--diff": Taken(most=2, files=True),
        "--table": Taken(most=ANY, files=True),
        "--print-completion": Taken(SHELLS),
        "--help": Taken(most=0),
    },
)
"""What a shell completes."""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page of runs, serve it, or print what differs between them; mistakes of the user end as in training."""
    parser = argparse.ArgumentParser(prog="python -m core.report", description="Look at runs, in a browser or as text.")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs, or patterns such as 'outputs/*'")
    parser.add_argument(
        "--out", type=Path, help="the page to write (default: report.html, in the folder of a run alone)"
    )
    parser.add_argument("--serve", action="store_true", help="serve the page on this machine, and follow running runs")
    parser.add_argument("--port", type=int, default=PORT, help=f"of --serve (default: {PORT}; 0 takes a free one)")
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="print the settings that differ between two runs")
    parser.add_argument("--table", nargs="+", metavar="RUN", help="print a line per run, the best first")
    parser.add_argument(
        "--print-completion", choices=SHELLS, metavar=PRINT_COMPLETION.metavar, help=PRINT_COMPLETION.doc
    )
    with exit_plainly():
        asked = parser.parse_args(argv)
        chosen = [name for name in ("diff", "table", "print_completion") if getattr(asked, name)]
        if len(chosen) + bool(asked.runs) != 1 or (asked.serve and asked.out):
            raise UserError("give runs, or --diff A B, or --table RUN ..., one of them; --out and --serve not at once")
        if asked.print_completion:
            return show(script(asked.print_completion, REPORT_PROGRAM))
        if asked.diff:
            return show(diff_text(*read_runs(asked.diff)))
        if asked.table:
            return show(leaderboard(read_runs(asked.table)))
        runs = found_runs(asked.runs)
        serve(runs, asked.port) if asked.serve else write_page(runs, asked.out)


def read_runs(words: Sequence[str]) -> list[RunFolder]:
    """The runs that these words name, read."""
    runs = found_runs(words)
    for run in runs:
        run.read()
    return runs


def write_page(runs: Sequence[RunFolder], out: Path | None) -> None:
    """Write the page of these runs, and say where it is and what could not be read."""
    for run in runs:
        run.read()
        for note in run.notes:
            show(f"{run.name}: {note}")
    data = page_data(runs)
    for note in data["notes"]:
        show(note)
    file = out or (runs[0].folder / "report.html" if len(runs) == 1 else Path("report.html"))
    text = page_text(data)
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; choose another place with --out") from error
    show(f"{file}: {len(runs)} run{'s' * (len(runs) > 1)}, {len(text) / 1e6:.1f} MB; open it in a browser")


def serve(runs: Sequence[RunFolder], port: int) -> None:
    """Serve the page of these runs until Ctrl-C or SIGTERM."""
    with ReportServer(Feed(runs), port) as server:
        signal.signal(signal.SIGTERM, partial(interrupt))
        show(f"{server.address} shows {len(runs)} run{'s' * (len(runs) > 1)} to this machine; Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


def interrupt(*_: Any) -> None:
    """End as Ctrl-C does."""
    raise KeyboardInterrupt
