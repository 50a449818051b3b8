"""What a test run says at its end: how far each layout was from one rank."""

import gc
import re
from collections.abc import Generator

import pytest


def pytest_collection_finish() -> None:
    """Leave all that was imported out of the collections of garbage of the tests, each of which would look at it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Skip a test that is refused what a later torch has, with the reason that a user is told."""
    report = yield
    if report.failed and (
        told := re.search(r"(with experts|on several ranks) needs torch 2\.12, this is 2\.11.*", report.longreprtext)
    ):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"Skipped: {told[0]}")
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the differences that `core.testing.layout_suite` recorded, the worst of each layout, as Markdown."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    rows = [value for report in reports for name, value in report.user_properties if name == "differences"]
    if not rows:
        return
    kinds = ["loss", "gradient", "grad norm", "next loss"]
    worst: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        seen = worst.setdefault((row["model"], row["layout"]), dict.fromkeys(kinds, 0.0))
        seen.update({kind: max(seen[kind], row[kind]) for kind in kinds})
    terminalreporter.section("differences from one rank")
    terminalreporter.line(f"| model | layout | {' | '.join(kinds)} |")
    terminalreporter.line("|---" * (len(kinds) + 2) + "|")
    for (model, layout), seen in worst.items():
        terminalreporter.line(f"| {model} | {layout} | {' | '.join(f'{seen[kind]:.0e}' for kind in kinds)} |")
