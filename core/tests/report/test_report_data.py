import hashlib
import math
import random
import re
from itertools import combinations

import numpy as np
import pytest
from written_runs import lines_of, record, write_run

from core.report.columns import Columns
from core.report.curves import N_BUCKETS, N_CELLS, curve, drawn_curves, heat_maps
from core.report.page import ASSETS

HASHES = {  # of package/dist and package/LICENSE in the npm package uplot 1.6.32
    "uPlot-1.6.32.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot-1.6.32.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "uPlot-LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}


def test_the_library_of_charts_is_the_published_one():
    assert {name: hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() for name in HASHES} == HASHES


def test_no_spike_is_lost_where_few_points_stand_for_many():
    draw = random.Random(0)
    column = np.array([draw.gauss(3, 0.1) for _ in range(50_000)])
    column[draw.sample(range(50_000), 500)] = math.nan
    spikes = {place: 10.0 + place for place in draw.sample(range(50_000), 40)}  # two of them may share a stretch
    dips = {place: -5.0 - place for place in draw.sample(range(50_000), 40)}
    for place, value in {**spikes, **dips}.items():
        column[place] = value
    rows, values, mean_rows, means = curve(column)
    assert len(rows) <= 2 * N_BUCKETS and len(means) == len(mean_rows) == N_BUCKETS
    assert (np.diff(rows) > 0).all() and (column[rows] == values).all()
    finite = column[np.isfinite(column)]
    for part in np.array_split(finite, N_BUCKETS // 2):  # each stretch of twice the length has its extremes
        assert part.max() <= values.max() and part.min() >= values.min()
    by_hand = [finite[k * len(finite) // N_BUCKETS : (k + 1) * len(finite) // N_BUCKETS] for k in range(N_BUCKETS)]
    drawn = set(values)
    assert all({part.min(), part.max()} <= drawn for part in by_hand)
    assert means == pytest.approx([part.mean() for part in by_hand])


def test_a_short_curve_is_drawn_as_it_is(tmp_path):
    run = write_run(
        tmp_path / "run", [record(step, validation_loss=2.5 if step == 20 else None) for step in (1, 10, 20)]
    )
    columns = Columns(run / "metrics.jsonl")
    columns.read()
    drawn = drawn_curves(columns)
    assert drawn["axes"] == {"step": [1, 10, 20], "tokens": [512, 5120, 10240], "time": [0.512, 5.12, 10.24]}
    assert drawn["curves"]["loss"] == {"rows": [0, 1, 2], "values": [10.0, 2.8, 2.4]}
    assert drawn["curves"]["validation_loss"] == {"rows": [2], "values": [2.5]}
    assert "mfu" not in drawn["curves"]


def test_a_file_is_read_on_as_it_grows_and_anew_when_it_is_replaced(tmp_path):
    file = write_run(tmp_path / "run", map(record, range(1, 4)), rest='{"step": 4, "lo') / "metrics.jsonl"
    columns = Columns(file)
    assert columns.read() and not columns.read()
    assert list(columns["step"]) == [1, 2, 3] and list(columns.notes()) == [
        "the last line of metrics.jsonl is half written"
    ]
    with file.open("a") as stream:
        stream.write('ss": 2.0}\n' + lines_of([record(5, mine=7.0)]))
    assert (
        columns.read()
        and list(columns["step"]) == [1, 2, 3, 4, 5]
        and list(columns.notes()) == ["grad_norm is no finite number at step 4"]
    )
    assert list(columns["mine"])[-1] == 7.0 and np.isnan(columns["mine"][:-1]).all()
    whole = Columns(file)
    whole.read()
    assert whole.columns.keys() == columns.columns.keys()
    assert all(np.array_equal(whole[name], columns[name], equal_nan=True) for name in whole.columns)
    other = file.with_name("other")
    other.write_text(lines_of([record(1), record(2)]))
    other.replace(file)
    assert columns.read() and list(columns["step"]) == [1, 2]


def test_what_is_damaged_is_said_and_the_rest_is_there(tmp_path):
    rows = [
        record(1),
        record(2, loss=math.nan),
        record(3, loss=math.inf),
        record(4, loss=None),
        record(5),
        record(4),
        record(6),
    ]
    bad = ["[]", "null", '{"step": "3"}', "{", '{"step": 7, "loss": ' + "[" * 100_000]
    text = lines_of(rows[:3]) + "\n".join(bad) + "\n\xff\n" + lines_of(rows[3:])
    (tmp_path / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    columns = Columns(tmp_path / "metrics.jsonl")
    columns.read()
    assert list(columns["step"]) == [1, 2, 3, 4, 6]
    assert list(columns.notes()) == [
        "6 lines of metrics.jsonl are no records",
        "2 records of metrics.jsonl are of steps that were trained again",
        "loss is no finite number at step 2, 3",
    ]
    assert drawn_curves(columns)["curves"]["loss"]["values"] == [10.0, 4.0, round(8 / 6 + 2, 6)]


def test_an_empty_file_is_said(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    columns = Columns(tmp_path / "metrics.jsonl")
    assert not columns.read() and list(columns.notes()) == ["metrics.jsonl holds no record: nothing to draw"]
    assert drawn_curves(columns) == {"axes": {"step": [], "tokens": []}, "curves": {}} and heat_maps(columns) == {}


def test_numbers_of_layers_are_a_map_of_their_largest(tmp_path):
    rows = [
        record(step, **{f"moe/layers.{layer}/load": 1 + layer + step / 1000 for layer in range(3)}, **{"moe/load": 9.0})
        for step in range(1, 601)
    ]
    rows[17]["moe/layers.1/load"] = 50.0
    rows[18]["moe/layers.2/load"] = None
    columns = Columns(write_run(tmp_path / "run", rows) / "metrics.jsonl")
    columns.read()
    assert "moe/load" in drawn_curves(columns)["curves"] and "moe/layers.0/load" not in drawn_curves(columns)["curves"]
    found = heat_maps(columns)["moe/load"]
    assert found["layers"] == ["layers.0", "layers.1", "layers.2"] and len(found["steps"]) == N_CELLS
    assert found["steps"][:4] == [5, 10, 15, 20] and found["steps"][-1] == 600
    assert found["values"][1][3] == 50.0 and found["values"][2][3] == 3.02 and found["values"][0][0] == 1.005


LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def channels(colour: str) -> np.ndarray:
    """The linear light of #rrggbb."""
    part = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def lab(linear: np.ndarray) -> np.ndarray:
    """CIE L*a*b* for D65, in which a distance of 2.3 is just noticeable."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    x, y, z = np.cbrt(np.maximum(xyz / [0.9505, 1.0, 1.089], 1e-6))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


BLINDNESS = {  # Machado, Oliveira and Fernandes 2009, severity 1, on linear light
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_are_told_apart_by_everybody_and_seen_on_the_page(theme):
    css = (ASSETS / "page.css").read_text()
    words = dict(
        re.findall(r"(--\w+): (#\w{6});", css.split(':root[data-theme="dark"]')[theme == "dark"].split("@media")[0])
    )
    panel = LUMINANCE @ channels(words["--panel"])
    colours = [channels(words[f"--c{place}"]) for place in range(6)]
    for colour in colours:
        darker, lighter = sorted((LUMINANCE @ colour, panel))
        assert (lighter + 0.05) / (darker + 0.05) >= 3  # as WCAG 2.1, 1.4.11 asks of graphics
    for kind, matrix in BLINDNESS.items():
        seen = [lab(np.clip(np.array(matrix) @ colour, 0, 1)) for colour in colours]
        nearest = min(float(np.linalg.norm(one - other)) for one, other in combinations(seen, 2))
        assert nearest > 13, (kind, nearest)
