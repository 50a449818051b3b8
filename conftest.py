"""What a test run says at its end: how far each layout was from one rank."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the differences that `core.testing.layout_suite` recorded, as a Markdown table."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    rows = [value for report in reports for name, value in report.user_properties if name == "differences"]
    if not rows:
        return
    kinds = ["loss", "gradient", "grad norm", "next loss"]
    terminalreporter.section("differences from one rank")
    terminalreporter.line(f"| model | layout | {' | '.join(kinds)} |")
    terminalreporter.line("|---" * (len(kinds) + 2) + "|")
    for row in rows:
        numbers = " | ".join(f"{row[kind]:.0e}" for kind in kinds)
        terminalreporter.line(f"| {row['model']} | {row['layout']} | {numbers} |")
