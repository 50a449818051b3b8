"""Long columns as few points: what is drawn of a run."""

import re
from collections import defaultdict
from typing import Any

import numpy as np

from core.report.columns import Columns

N_BUCKETS = 500
"""A curve is drawn with the lowest and the highest value of so many stretches of records."""
N_CELLS = 120
"""Columns of a heat map."""
LAYER = re.compile(r"(?:^|/)([\w.]*layers\.\d+)(?=/|$)")
"""The part of a number's name that says which layer it is of: moe/layers.3/dead_experts."""


def drawn_curves(columns: Columns) -> dict[str, Any]:
    """The curves of a run, by name, over the positions of `axes`: steps, tokens and seconds at the points that are
    drawn."""
    found = {name: curve(columns[name]) for name in columns.names() if not LAYER.search(name)}
    kept = np.unique(np.concatenate([rows for each in found.values() for rows in each[::2]] or [np.array([], int)]))
    times = columns.times()
    axes = {"step": columns["step"], "tokens": columns["tokens"]} | ({} if times is None else {"time": times})
    return {
        "axes": {name: short_numbers(axis[kept]) for name, axis in axes.items() if np.isfinite(axis).all()},
        "curves": {
            name: {"rows": np.searchsorted(kept, rows).tolist(), "values": short_numbers(values)}
            | (
                {}
                if means is values
                else {"mean_rows": np.searchsorted(kept, mean_rows).tolist(), "means": short_numbers(means)}
            )
            for name, (rows, values, mean_rows, means) in found.items()
        },
    }


def curve(column: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The rows and values of the points that stand for a column of shape (n,), and those of the means that a smoothed
    curve is made of.

    Few values are all there, and their own means. Of many, each of `N_BUCKETS` stretches keeps its lowest and its
    highest, so that no spike is lost, and the mean at its last row.
    """
    rows = np.flatnonzero(np.isfinite(column))
    values = column[rows]
    if len(rows) <= 2 * N_BUCKETS:
        return rows, values, rows, values
    ends = np.linspace(0, len(rows), N_BUCKETS + 1).astype(int)
    kept, means = [], []
    for first, end in zip(ends[:-1], ends[1:], strict=True):
        part = values[first:end]
        kept += sorted({first + int(part.argmin()), first + int(part.argmax())})
        means.append(part.mean())
    return rows[kept], values[kept], rows[ends[1:] - 1], np.array(means)


def heat_maps(columns: Columns) -> dict[str, Any]:
    """Numbers of single layers: for each kind of number its layers, the last step of every column of the map, and the
    largest value of each layer there, null where there is none."""
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for name in columns.names():
        if found := LAYER.search(name):
            kind = (name[: found.start()] + name[found.end() :]).strip("/")
            groups[kind][found[1]] = name
    maps = {}
    for kind, layers in groups.items():
        table = np.stack([columns[name] for name in layers.values()])
        table[~np.isfinite(table)] = -np.inf
        table = table[:, there := np.flatnonzero((table > -np.inf).any(axis=0))]
        starts = np.unique(np.linspace(0, len(there), min(N_CELLS, len(there)), endpoint=False).astype(int))
        cells = np.maximum.reduceat(table, starts, axis=1)
        last = there[np.append(starts[1:], len(there)) - 1]
        maps[kind] = {
            "layers": list(layers),
            "steps": short_numbers(columns["step"][last]),
            "values": [[None if cell == -np.inf else seven_digits(cell) for cell in row] for row in cells],
        }
    return maps


def short_numbers(values: np.ndarray) -> list[float]:
    """Numbers of shape (n,), short enough for a page."""
    return [seven_digits(value) for value in values]


def seven_digits(value: float) -> float:
    """A number to seven digits, whole ones exactly."""
    return int(value) if value == int(value) else float(f"{value:.7g}")
