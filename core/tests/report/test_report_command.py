import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from written_runs import lines_of, record, write_run

from core.config.errors import UserError
from core.report.command import main
from core.report.run_folder import RunFolder, found_runs
from core.report.server import Feed, ReportServer

HOSTILE = "</script><script>alert(1)</script>"


def data_in(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def told(capsys: pytest.CaptureFixture, *words: str | Path) -> str:
    main(list(map(str, words)))
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture, *words: str | Path) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(map(str, words)))
    assert end.value.code == 2
    return capsys.readouterr().err


def test_the_page_is_one_file_that_asks_nobody_for_anything(tmp_path, capsys):
    run = write_run(tmp_path / "run", map(record, range(1, 30)), {"recipe": HOSTILE, "training": {"steps": 40}})
    assert "report.html: 1 run" in told(capsys, run)
    page = (run / "report.html").read_text()
    assert not re.search(r"""<(link|img|iframe|base)\b|\b(src|href)\s*=|url\(|@import|/\*\{""", page)
    assert page.count("<script") == 2 and page.count("</script>") == 2
    (shown,) = data_in(page)["runs"]
    assert shown["facts"]["recipe"] == HOSTILE and shown["facts"]["step"] == "29 of 40" and shown["notes"] == []
    assert ["training.steps", "40"] in shown["settings"]


def test_runs_side_by_side_say_what_differs(tmp_path, capsys):
    for lr in (1, 2, 3):
        write_run(
            tmp_path / f"lr-{lr}",
            [record(1), record(9, validation_loss=4.0 - lr)],
            {"recipe": "toy", "lr": lr, "dump_folder": str(lr)},
        )
    (tmp_path / "notes").mkdir()
    out = tmp_path / "page.html"
    told(capsys, tmp_path / "*", "--out", out)
    data = data_in(out.read_text())
    assert [run["name"] for run in data["runs"]] == ["lr-1", "lr-2", "lr-3"]
    assert data["differences"] == [["lr", ["1", "2", "3"]]]
    assert told(capsys, "--diff", tmp_path / "lr-1", tmp_path / "lr-3") == "lr-1 -> lr-3\nlr: 1 -> 3\n"
    write_run(tmp_path / "lr-1b", [record(1)], {"recipe": "toy", "lr": 1})
    lines = [line.split() for line in told(capsys, "--table", tmp_path / "lr*").splitlines()]
    assert lines[0] == ["run", "recipe", "step", "loss", "best", "val", "at", "tok/s", "changes"]
    assert lines[1] == ["lr-3", "toy", "9", "2.8889", "1.0000", "9", "1.00k", "lr", "3"]
    assert [line[0] for line in lines[1:]] == ["lr-3", "lr-2", "lr-1", "lr-1b"] and lines[3][-1] == "1.00k"


def test_what_cannot_be_read_is_a_line_each_and_the_rest_is_drawn(tmp_path, capsys):
    good = write_run(tmp_path / "good", [record(1)])
    torn = write_run(tmp_path / "torn", [record(1), record(2)], rest='{"st')
    (torn / "config.json").write_text('{"recipe": ')
    (torn / "events.jsonl").write_text('{"step": 1, "event": "start", "system": {"torch": "2"}}\nx\n')
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    said = told(capsys, good, torn, empty, "--out", tmp_path / "page.html").splitlines()
    assert [line.partition(": ")[0] for line in said[:-1]] == ["torn", "torn", "torn", "empty"]
    assert "config.json is not JSON" in said[0] and said[1] == "torn: 1 line of events.jsonl is no event"
    assert said[3] == "empty: metrics.jsonl cannot be read: No such file or directory"
    runs = data_in((tmp_path / "page.html").read_text())["runs"]
    assert [len(run["axes"]["step"]) for run in runs] == [1, 2, 0] and runs[1]["system"] == {"torch": "2"}


@pytest.mark.parametrize(
    "words, said",
    [
        (["nowhere"], "error: nowhere is no run: it is not there\n"),
        (["."], "error: . is no run: it has no config.json and no metrics.jsonl\n"),
        (["x*"], "error: x* is no run: it matches no run\n"),
        ([], "error: give runs, or --diff A B, or --table RUN ..., one of them; --out and --serve not at once\n"),
    ],
)
def test_a_folder_that_is_no_run_is_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert refusal(capsys, *words) == said


def test_mixed_versions_are_said_of_runs_and_of_the_starts_of_one(tmp_path, capsys):
    runs = [write_run(tmp_path / name, map(record, (1, 2))) for name in ("a", "b", "c")]
    for run, versions in zip(runs, (["2.13.0"], ["2.13.0", "2.14.1"], []), strict=True):
        starts = [{"step": k, "event": "start", "system": {"core": "1.0", "torch": v}} for k, v in enumerate(versions)]
        (run / "events.jsonl").write_text(lines_of(starts))
    out = tmp_path / "page.html"
    line = "mixed versions of torch: 2.13.0 (a, b), 2.14.1 (b)"
    assert told(capsys, *runs, "--out", out).splitlines()[0] == line
    assert data_in(out.read_text())["notes"] == [line]
    told(capsys, runs[0], runs[2], "--out", out)
    assert data_in(out.read_text())["notes"] == []


def test_tables_are_in_the_order_of_steps_and_the_schedule_is_that_of_the_last_start(tmp_path, capsys):
    run = write_run(tmp_path / "run", map(record, (1, 2)))
    for name in ("profile_traces/step-20-rank-0", "profile_traces/step-3-rank-0", "memory_snapshot/step-2-rank-0"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / f"{name}.txt").write_text(f"table of {name}")
    schedules = ([[1, 0.5]], [[1, 0.1], [2, "x"], [3], None, [4, 0.2]], "no list")
    (run / "events.jsonl").write_text(
        lines_of({"step": step, "event": "start", "schedule": each} for step, each in enumerate(schedules))
    )
    told(capsys, run)
    (shown,) = data_in((run / "report.html").read_text())["runs"]
    names = ["profile_traces/step-3-rank-0", "profile_traces/step-20-rank-0", "memory_snapshot/step-2-rank-0"]
    assert shown["profiles"] == {f"{name}.txt": f"table of {name}" for name in names}
    assert shown["schedule"] == [[1, 0.1], [4, 0.2]]


def test_the_plan_stands_beside_what_was_measured(tmp_path):
    folder = write_run(tmp_path / "run", map(record, (1, 2, 3)))
    plan = {"peak_bytes": 2**28, "model_flops": 1_000_000, "rows": 2, "seq_len": 256}
    (folder / "plan.json").write_text(json.dumps(plan))
    run = RunFolder(folder, "run")
    run.read()
    assert list(run.planned()) == [
        ("memory of this rank", "256.00 MiB", "512.00 MiB"),
        ("FLOPs of the model, this rank, a step", "1.00M", "1.95M per second"),
        ("tokens in a step", "512", "512"),
    ]


@contextmanager
def served(*folders: Path) -> Iterator[str]:
    with ReportServer(Feed(found_runs(list(map(str, folders)))), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.address
        finally:
            server.shutdown()
            thread.join()


def get(address: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_server_follows_a_run_and_is_for_this_machine_alone(tmp_path):
    run = write_run(tmp_path / "run", [record(1)])
    with served(run) as address:
        assert address.startswith("http://127.0.0.1:")
        code, page = get(address)
        first = data_in(page)
        assert code == 200 and first["following"] and first["runs"][0]["axes"]["step"] == [1]
        assert get(f"{address}data?version={first['version']}") == (204, "")
        with (run / "metrics.jsonl").open("a") as stream:
            stream.write(lines_of([record(2)]))
        code, text = get(f"{address}data?version={first['version']}")
        assert code == 200 and json.loads(text)["runs"][0]["axes"]["step"] == [1, 2]
        assert get(f"{address}config.json")[0] == 404
        assert get(address, Host="somewhere.example:80") == (403, "only for this machine")
        with pytest.raises(UserError, match=r"port \d+ is taken or not allowed: --port \d+ is free"):
            ReportServer(Feed([]), int(address.rsplit(":")[-1].strip("/")))
