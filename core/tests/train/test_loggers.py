"""The loggers of a run, with the real packages; `nox -s loggers` installs those of others."""

import json
import math
import sqlite3
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from observers_of_a_user import Perplexity
from toy_run import toy_run

from core.report.command import read_runs
from core.report.page import page_data
from core.runtime.records import read_records
from core.train.loggers import MLflow, TensorBoard, Told, Trackio, WeightsAndBiases, run_id, tag
from core.train.metrics import Metrics

SECRET = "5ec2e7" * 6 + "5ec2"
SETTINGS = {"recipe": "toy", "training": {"steps": 4}}


def told(folder: Path, start: int = 0) -> Told:
    return Told(folder, SETTINGS, start, "a project", "a run", ["first"], offline=True)


def log_twice(logger: Any, folder: Path) -> None:
    """Steps 1 to 3, and, of a run that went on after step 2, 3 and 4."""
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        shown = logger(told(folder, start))
        shown.open()
        for step in steps:
            shown.write(step, {"train/loss": 8.0 / step, "speed/mfu": math.nan if step == 2 else 0.5})
        shown.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Trackio's store, whose place it reads once, when it is imported."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        yield folder


def test_numbers_are_in_groups():
    names = ("loss", "lr", "validation_loss", "validation_bits_per_byte", "mfu", "tokens", "moe/balance_loss", "seen")
    tags = ("train/loss", "train/lr", "validation/loss", "validation/bits_per_byte", "speed/mfu", "speed/tokens")
    assert [tag(name) for name in names] == [*tags, "moe/balance_loss", "train/seen"]


def test_a_run_keeps_its_id(tmp_path):
    assert run_id(tmp_path, "one", lambda: "a") == run_id(tmp_path, "one", lambda: "b") == "a"
    assert run_id(tmp_path, "two", lambda: "c") == "c"
    assert json.loads((tmp_path / "logger-runs.json").read_text()) == {"one": "a", "two": "c"}
    (tmp_path / "logger-runs.json").write_text("{")
    assert run_id(tmp_path, "one", lambda: "d") == "d"


def test_tensorboard_shows_each_step_once_and_nan_and_the_configuration(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_twice(partial(TensorBoard, folder=tmp_path / "tb"), tmp_path)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(each.step, each.value) for each in events.Scalars("train/loss")] == [
        (step, pytest.approx(8 / step)) for step in (1, 2, 3, 4)
    ]
    assert [math.isnan(each.value) for each in events.Scalars("speed/mfu")] == [False, True, False, False]
    (shown,) = events.Tensors("configuration/text_summary")[-1:]
    text = shown.tensor_proto.string_val[0].decode()
    assert json.loads(text) == SETTINGS and all(line.startswith("    ") for line in text.splitlines())


@pytest.mark.loggers
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    """Both starts are one run in its records: the second goes on with the id of the first."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_twice(WeightsAndBiases, tmp_path)
    folders = [path for path in (tmp_path / "wandb").iterdir() if path.name.startswith("offline-run")]
    (name,) = json.loads((tmp_path / "logger-runs.json").read_text()).values()
    assert 1 <= len(folders) <= 2 and all(path.name.endswith(name) for path in folders)
    written = b"".join(file.read_bytes() for path in folders for file in path.glob("*.wandb"))
    for words in (b"train/loss", b"a project", b"a run", b"first", b"speed/mfu"):
        assert words in written


@pytest.mark.loggers
def test_a_number_of_a_user_is_wherever_those_of_the_run_are(tmp_path, store, monkeypatch, capsys):
    """In the record, on the console, on the page, in TensorBoard, at Weights & Biases, Trackio and MLflow; keys of the
    environment are nowhere."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("WANDB_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, SECRET)
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = toy_run(tmp_path, steps=3)
    run.observers = [Perplexity.Config(decay=0.0, console=True)]
    run.metrics = Metrics.Config(log_freq=1, offline=True, project="observed")
    for name in ("tensorboard", "wandb", "trackio", "mlflow"):
        setattr(run.metrics, f"enable_{name}", True)
    _, folder = run.build().run()
    expected = [record["perplexity"] for record in read_records(folder)]
    assert [math.exp(record["loss"]) for record in read_records(folder)] == pytest.approx(expected)
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err
    assert not [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    lines = [line for line in said.out.splitlines() if line.startswith("step ")]
    assert [line.rpartition("  ")[2] for line in lines] == [f"perplexity {value:.4g}" for value in expected]
    (shown,) = page_data(read_runs([str(folder)]))["runs"]
    assert shown["curves"]["perplexity"]["values"] == pytest.approx(expected, rel=1e-6)
    events = EventAccumulator(str(folder / "tb")).Reload()
    assert [each.value for each in events.Scalars("train/perplexity")] == pytest.approx(expected)
    (file,) = (folder / "wandb").glob("offline-run*/*.wandb")
    assert file.read_bytes().count(b"train/perplexity") >= 3
    with sqlite3.connect(next(store.glob("*observed*.db"))) as shown_by_trackio:
        rows = shown_by_trackio.execute("select metrics from metrics order by step").fetchall()
    assert [json.loads(metrics)["train/perplexity"] for (metrics,) in rows] == pytest.approx(expected)
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("observed").experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/perplexity")
    assert [each.value for each in sorted(history, key=lambda each: each.step)] == pytest.approx(expected)


@pytest.mark.loggers
def test_trackio_in_its_own_store(tmp_path, store):
    log_twice(Trackio, tmp_path)
    (file,) = store.glob("*project*.db")
    with sqlite3.connect(file) as shown:
        rows = shown.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in rows} == {"a run"}
    values = {(step, json.loads(metrics)["train/loss"]) for _, step, metrics in rows}
    assert values == {(step, 8.0 / step) for step in (1, 2, 3, 4)}


@pytest.mark.loggers
def test_mlflow_in_the_folder_of_the_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from mlflow import MlflowClient

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    log_twice(MLflow, tmp_path)
    assert not list((tmp_path / "elsewhere").iterdir()) and list((tmp_path / "mlflow").rglob("config.json"))
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'a project'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "a run" and "first" in run.data.tags
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert {(each.step, each.value) for each in history} == {(step, 8.0 / step) for step in (1, 2, 3, 4)}
