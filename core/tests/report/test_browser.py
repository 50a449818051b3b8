"""The page in a headless Chromium; `nox -s browser` installs what that needs."""

import math
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from written_runs import lines_of, record, write_run

from core.report.command import main
from core.report.run_folder import found_runs
from core.report.server import Feed, ReportServer

pytestmark = pytest.mark.browser
DRAWN = "[...document.querySelectorAll('#charts .panel canvas')].length"
COUNT_INK = """canvas => { const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    let n = 0; for (let i = 3; i < pixels.length; i += 4) n += pixels[i] > 0; return n; }"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Opened:
    """A page that is open, and what it complained of."""

    def __init__(self, browser: Any, address: str, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": 1300, "height": 900}, color_scheme=scheme)
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on(
            "console", lambda message: self.complaints.append(message.text) if message.type == "error" else None
        )
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.inspected = self.page.context.new_cdp_session(self.page)
        self.inspected.send("Performance.enable")
        self.page.goto(address)
        self.page.wait_for_selector("body[data-ready]", state="attached")

    def computed_s(self) -> float:
        """CPU seconds of the page so far, whatever else the machine does."""
        told = self.inspected.send("Performance.getMetrics")["metrics"]
        return next(each["value"] for each in told if each["name"] == "ThreadTime")

    def scale(self, name: str, axis: str) -> tuple[float, float]:
        return tuple(
            self.page.evaluate(
                f"(() => {{ const s = charts.get('{name}').plot.scales.{axis}; return [s.min, s.max]; }})()"
            )
        )


def page_of(folder: Path, *patterns: Path) -> str:
    out = folder / "page.html"
    main([*map(str, patterns), "--out", str(out)])
    return out.as_uri()


def test_a_page_opens_draws_and_switches_its_axes(browser, tmp_path):
    run = write_run(
        tmp_path / "run", [record(step, validation_loss=3.0 if step % 50 == 0 else None) for step in range(1, 201)]
    )
    opened = Opened(browser, page_of(tmp_path, run))
    page = opened.page
    panels = page.locator("#charts .panel")
    assert {panel.get_attribute("data-name") for panel in panels.all()} >= {
        "loss",
        "validation_loss",
        "grad_norm",
        "lr",
    }
    canvas = page.locator("[data-name=loss] canvas")
    assert canvas.evaluate(COUNT_INK) > 1000
    assert opened.scale("loss", "x")[1] == 200 and opened.scale("loss", "y")[1] >= 10
    before = canvas.evaluate("canvas => canvas.toDataURL()")
    page.select_option("#axis", "tokens")
    assert opened.scale("loss", "x")[1] == 200 * 512
    page.select_option("#axis", "time")
    assert opened.scale("loss", "x")[1] == pytest.approx(200 * 0.512)
    page.select_option("#scale", "log")
    assert page.evaluate("charts.get('loss').plot.scales.y.distr") == 3
    page.select_option("#axis", "step")
    page.select_option("#scale", "linear")
    assert canvas.evaluate("canvas => canvas.toDataURL()") == before
    page.locator("#smoothing").fill("0")
    assert canvas.evaluate("canvas => canvas.toDataURL()") != before
    page.locator("[data-name=loss] .u-over").hover(position={"x": 150, "y": 60})
    assert "run: " in page.locator("[data-name=loss] .tip").inner_text()
    assert opened.complaints == [] and len(opened.asked) == 1


def test_rates_to_come_validation_and_where_a_step_goes_are_drawn(browser, tmp_path):
    run = write_run(
        tmp_path / "run", [record(step, validation_loss=3.0 if step % 10 == 0 else None) for step in range(1, 41)]
    )
    start = {"step": 0, "event": "start", "text": "began", "schedule": [[1, 1e-3], [50, 1e-3], [100, 1e-4]]}
    (run / "events.jsonl").write_text(lines_of([start]))
    (run / "profile_traces").mkdir()
    table = f"where the time of a step goes\n\n{'':36}{'ms per step':>12}{'share':>9}\n"
    table += "".join(f"{name:36}{ms:12,.2f}{share:9.1%}\n" for name, ms, share in (("a", 1500, 0.75), ("b", 500, 0.25)))
    (run / "profile_traces" / "step-10-rank-0.txt").write_text(f"{table}{'a step':36}{2000:12,.2f}\n")
    opened = Opened(browser, page_of(tmp_path, run))
    page = opened.page
    assert opened.scale("lr", "x")[1] == 100, "rates to the last step"
    assert page.evaluate("charts.get('loss').plot.series.length") == 1 + 3, "validation, what was measured, smoothed"
    page.select_option("#axis", "tokens")
    assert opened.scale("lr", "x")[1] == 40 * 512
    widths = page.locator(".split i").evaluate_all("parts => parts.map(part => part.style.width)")
    assert widths == ["75%", "25%"]
    rows = page.locator(".split-table tr").all_inner_texts()
    assert [row.split() for row in rows] == [
        ["ms", "per", "step", "share"],
        ["a", "1,500.00", "75.0%"],
        ["b", "500.00", "25.0%"],
    ]
    assert page.locator("summary").first.inner_text() == "Where the time of a step goes"
    page.locator("[data-name=loss] .widen").click()
    assert opened.page.evaluate("charts.get('loss').plot.width") > 1000 and opened.complaints == []


def test_dark_pages_are_dark(browser, tmp_path):
    address = page_of(tmp_path, write_run(tmp_path / "run", map(record, range(1, 30))))
    back = "getComputedStyle(document.body).backgroundColor"
    assert Opened(browser, address).page.evaluate(back) == "rgb(243, 244, 246)"
    dark = Opened(browser, address, scheme="dark")
    assert dark.page.evaluate(back) == "rgb(17, 20, 24)"
    dark.page.click("#theme")
    assert dark.page.evaluate(back) == "rgb(243, 244, 246)" and dark.complaints == []


def test_two_hundred_thousand_steps_open_at_once_and_keep_their_spike(browser, tmp_path):
    draw = random.Random(0)
    rows = (record(step, loss=40.0 if step == 123_457 else draw.gauss(3, 0.1)) for step in range(1, 200_001))
    opened = Opened(browser, page_of(tmp_path, write_run(tmp_path / "run", rows)))
    assert 0 < opened.computed_s() < 3 and opened.scale("loss", "y")[1] >= 40
    assert opened.complaints == []


def test_twenty_runs_are_drawn_at_once(browser, tmp_path):
    for n in range(20):
        write_run(
            tmp_path / f"runs/{n:02}", (record(step, loss=n + 8 / step, step_time_s=0.1 + n) for step in range(1, 2001))
        )
    opened = Opened(browser, page_of(tmp_path, tmp_path / "runs/*"))
    assert 0 < opened.computed_s() < 3
    assert opened.page.evaluate("charts.get('loss').plot.series.length") == 1 + 20 * 2
    opened.page.select_option("#axis", "time")
    opened.page.locator("#runs input").nth(19).uncheck()
    assert opened.page.evaluate("charts.get('loss').plot.series.length") == 1 + 19 * 2
    assert opened.scale("loss", "x")[1] == pytest.approx(2000 * 18.1) and opened.complaints == []


def test_what_is_damaged_is_said_and_all_else_drawn(browser, tmp_path):
    rows = [record(step, loss=math.nan if step == 5 else 2.0) for step in range(1, 30)]
    write_run(tmp_path / "runs/torn", rows, rest='{"step": 30, "lo')
    write_run(tmp_path / "runs/empty", [])
    opened = Opened(browser, page_of(tmp_path, tmp_path / "runs/*"))
    assert opened.page.locator("#notes li").all_inner_texts() == [
        "empty: metrics.jsonl holds no record: nothing to draw",
        "torn: the last line of metrics.jsonl is half written",
        "torn: loss is no finite number at step 5",
    ]
    assert opened.page.evaluate(DRAWN) > 3 and opened.complaints == []


def test_a_served_page_follows_its_run(browser, tmp_path):
    run = write_run(tmp_path / "run", map(record, range(1, 11)))
    with ReportServer(Feed(found_runs([str(run)])), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            opened = Opened(browser, server.address)
            assert opened.scale("loss", "x")[1] == 10
            with (run / "metrics.jsonl").open("a") as stream:
                stream.write(lines_of([record(11), record(12)]))
            opened.page.wait_for_selector("body[data-version]", state="attached")
            assert opened.scale("loss", "x")[1] == 12 and opened.complaints == []
            opened.page.close()
        finally:
            server.shutdown()
            thread.join()
