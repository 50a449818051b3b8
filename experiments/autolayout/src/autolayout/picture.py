"""A picture of layouts: seconds a step against memory of a rank, as SVG."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from autolayout.estimate import Estimate
from core.config.errors import UserError

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 860, 520, 70, 30, 30, 60
COLOURS = {"none": "#0072b2", "selective": "#009e73", "full": "#d55e00"}
"""By the mode of checkpointing; of Okabe and Ito, told apart by colour-blind people too."""


def picture(estimates: Sequence[Estimate], best: Sequence[Estimate], room_gib: float) -> str:
    """All layouts as points, the limit of memory, and the front of those that none beats in both."""
    place = Axes(estimates)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *place.drawn(),
    ]
    for each in estimates:
        x, y = place(each)
        colour = COLOURS[each.layout.mode]
        lines.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}" fill-opacity="0.35">{title(each)}</circle>'
        )
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, front(estimates)))
    lines.append(f'<polyline points="{points}" fill="none" stroke="#555" stroke-width="1.5"/>')
    if place.lowest_gib < room_gib < place.highest_gib:
        x = place.across(room_gib)
        lines.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#cc79a7" stroke-dasharray="6 4"/>')
        lines.append(f'<text x="{x + 5:.1f}" y="{TOP + 12}" fill="#cc79a7">{room_gib:g} GiB</text>')
    for each in best[:1]:
        x, y = place(each)
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8" fill="none" stroke="black" stroke-width="2"/>')
        lines.append(f'<text x="{x + 12:.1f}" y="{y + 4:.1f}">{escape(str(each.layout))}</text>')
    for number, (mode, colour) in enumerate(COLOURS.items()):
        y = TOP + 18 * number + 6
        lines.append(f'<circle cx="{WIDTH - 120}" cy="{y}" r="5" fill="{colour}"/>')
        lines.append(f'<text x="{WIDTH - 108}" y="{y + 4}">{mode}</text>')
    return "\n".join([*lines, "</svg>", ""])


def check_picture(file: str) -> None:
    """Raise `UserError` where there is no folder for a picture, before a search of minutes."""
    folder = Path(file).expanduser().parent
    if not folder.is_dir():
        raise UserError(f"cannot write {file}: there is no folder {folder}; choose another --picture")


def draw(file: str, estimates: Sequence[Estimate], best: Sequence[Estimate], room_gib: float) -> None:
    """Write the picture. Raises `UserError` where the file cannot be written."""
    try:
        Path(file).expanduser().write_text(picture(estimates, best, room_gib), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; choose another --picture") from error


def title(each: Estimate) -> str:
    """What a browser says of a point."""
    return f"<title>{escape(str(each.layout))}: {each.seconds:.2f} s, {each.peak_gib:.1f} GiB</title>"


def front(estimates: Iterable[Estimate]) -> list[Estimate]:
    """The layouts that no other beats in both time and memory, by memory (the Pareto front)."""
    found: list[Estimate] = []
    for each in sorted(estimates, key=lambda each: (each.peak_gib, each.seconds)):
        if not found or each.seconds < found[-1].seconds:
            found.append(each)
    return found


class Axes:
    """Where a layout lies in the picture; both axes are logarithmic."""

    def __init__(self, estimates: Sequence[Estimate]) -> None:
        memory, seconds = [each.peak_gib for each in estimates], [each.seconds for each in estimates]
        self.lowest_gib, self.highest_gib = min(memory) / 1.1, max(memory) * 1.1
        self.least_s, self.most_s = min(seconds) / 1.1, max(seconds) * 1.1

    def __call__(self, each: Estimate) -> tuple[float, float]:
        return self.across(each.peak_gib), self.down(each.seconds)

    def across(self, gib: float) -> float:
        share = math.log(gib / self.lowest_gib) / math.log(self.highest_gib / self.lowest_gib)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def down(self, seconds: float) -> float:
        share = math.log(seconds / self.least_s) / math.log(self.most_s / self.least_s)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def drawn(self) -> Iterator[str]:
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        yield f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="black"/>'
        for value in ticks(self.lowest_gib, self.highest_gib):
            x = self.across(value)
            yield f'<path d="M{x:.1f} {bottom}v5" stroke="black"/>'
            yield f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{value:g}</text>'
        for value in ticks(self.least_s, self.most_s):
            y = self.down(value)
            yield f'<path d="M{LEFT} {y:.1f}h-5" stroke="black"/>'
            yield f'<text x="{LEFT - 9}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
        yield f'<text x="{(LEFT + right) / 2}" y="{bottom + 44}" text-anchor="middle">GiB of a rank</text>'
        yield f'<text x="{LEFT}" y="{TOP - 10}">seconds a step</text>'


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two numbers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [value for power in powers for digit in (1, 2, 5) if low <= (value := digit * 10**power) <= high]
