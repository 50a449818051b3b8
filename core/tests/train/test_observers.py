"""Observers: numbers of one's own in the record, reasons to stop, on one rank and on several, and after a resume."""

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
from observers_of_a_user import Patience, Perplexity, Scripted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_run import toy_run

from core.checkpoint.settings import Checkpoint
from core.config import cli
from core.config.errors import UserError
from core.config.record import from_json, to_json
from core.report.command import read_runs
from core.report.page import page_data
from core.step.update import StepInfo
from core.testing.ranks import run_ranks
from core.train.metrics import Record
from core.train.observers import Observer
from core.train.outcome import RunResult
from core.train.trainer import Trainer
from core.train.validate import Validator


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def observed(folder: Path, *observers: Observer.Config, steps: int = 4, freq: int = 1) -> Trainer.Config:
    config = toy_run(folder, steps=steps)
    config.metrics.log_freq, config.observers = freq, list(observers)
    return config


def test_numbers_stand_in_the_record_the_page_and_tensorboard_and_on_the_console_if_asked(
    tmp_path: Path, capsys: Any
) -> None:
    config = observed(tmp_path, Perplexity.Config(decay=0.0, console=True), Scripted.Config())
    config.metrics.enable_tensorboard = True
    record, folder = config.build().run()
    found = records(folder)
    assert [each["perplexity"] for each in found] == [pytest.approx(math.exp(each["loss"])) for each in found]
    assert [each["seen"] for each in found] == [1, 2, 3, 4]
    assert record is not None and record.numbers == {"perplexity": found[-1]["perplexity"], "seen": 4}
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.rpartition("  ")[2] for line in lines] == [f"perplexity {each['perplexity']:.4g}" for each in found]
    events = EventAccumulator(str(folder / "tb")).Reload()
    assert [each.value for each in events.Scalars("train/perplexity")] == pytest.approx(
        [each["perplexity"] for each in found]
    )
    (shown,) = page_data(read_runs([str(folder)]))["runs"]
    assert shown["curves"]["perplexity"]["values"] == pytest.approx([each["perplexity"] for each in found], rel=1e-6)
    seen = [line.split() for line in (folder / "seen-0").read_text().splitlines()]
    assert [(int(step), float(loss), float(norm)) for step, loss, norm in seen] == [
        (each["step"], each["loss"], each["grad_norm"]) for each in found
    ]


def test_a_number_of_any_step_is_in_the_next_record(tmp_path: Path) -> None:
    config = observed(tmp_path, Scripted.Config(only_step=3), Scripted.Config(name="last"), steps=8, freq=5)
    _, folder = config.build().run()
    assert [(each["step"], each.get("seen"), each["last"]) for each in records(folder)] == [
        (1, None, 1),
        (5, 3, 5),
        (8, None, 8),
    ]


def test_tensorboard_has_the_numbers(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = observed(tmp_path, Scripted.Config())
    config.metrics.enable_tensorboard = True
    _, folder = config.build().run()
    events = event_accumulator.EventAccumulator(str(folder / "tb"))
    events.Reload()
    assert [(each.step, each.value) for each in events.Scalars("train/seen")] == [(n, n) for n in range(1, 5)]


def test_an_observer_stops_the_run_which_goes_on_later(tmp_path: Path, capsys: Any) -> None:
    config = observed(tmp_path, Scripted.Config(stop_on=(0, 2)))
    config.checkpoint = Checkpoint(enable=True, interval=100)
    _, folder = config.build().run()
    said = capsys.readouterr().out
    assert "observer 0 Scripted: the script says so: stopping after this step\n" in said
    assert "stopped by observer 0 Scripted (the script says so) after step 2 of 4\n" in said
    assert [each["step"] for each in records(folder)] == [1, 2]
    config.build().run()
    assert [each["step"] for each in records(folder)] == [1, 2, 3, 4]


def test_the_loss_on_held_out_text_may_stop_a_run(tmp_path: Path) -> None:
    config = observed(tmp_path, Patience.Config(patience=2), steps=30)
    config.validator = Validator.Config(enable=True, freq=2)
    config.optimizer.lr = 0.0  # nothing is learned: the second validation is no better, nor the third
    _, folder = config.build().run()
    measured = {each["step"]: each["validation_loss"] for each in records(folder)}
    assert max(measured) == 6 and measured[2] == measured[4] == measured[6] and measured[5] is None


def test_a_run_that_goes_on_has_the_numbers_of_one_that_never_stopped(tmp_path: Path) -> None:
    """The state of an observer is saved, and records behind the checkpoint are set aside with their numbers."""
    whole = observed(tmp_path, Perplexity.Config(), steps=6)
    _, folder = whole.build().run()
    expected = [(each["loss"], each["perplexity"]) for each in records(folder)]
    parts = observed(tmp_path, Perplexity.Config(), steps=6)
    parts.dump_folder, parts.checkpoint = str(tmp_path / "parts"), Checkpoint(enable=True, interval=3)
    parts.build().run()
    parts.checkpoint.load_step, parts.checkpoint.allow_config_change = 3, True
    _, folder = parts.build().run()
    assert [(each["loss"], each["perplexity"]) for each in records(folder)] == expected
    aside = (folder / "metrics.attempt-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["perplexity"] for line in aside] == [perplexity for _, perplexity in expected]


def test_observers_may_change_when_a_run_goes_on(tmp_path: Path, capsys: Any) -> None:
    config = observed(tmp_path, Perplexity.Config(), steps=2)
    config.checkpoint = Checkpoint(enable=True)
    config.build().run()
    config.observers, config.training.steps = [Scripted.Config()], 4
    _, folder = config.build().run()
    assert "observer 0 Perplexity is not in this run" in capsys.readouterr().out
    assert [(each.get("perplexity") is None, each.get("seen")) for each in records(folder)] == [
        (False, None),
        (False, None),
        (True, 3),
        (True, 4),
    ]


WRONG = {
    "loss": (Scripted.Config(name="loss"), "returned the number loss, which is a field of the record: rename it"),
    "own": (Scripted.Config(name="numbers"), "numbers, which is a field of the record"),
    "empty": (Scripted.Config(name=""), "a number called '': its name must be a text"),
    "key": (Scripted.Config(fault="key"), "a number called 3: its name must be a text"),
    "tensor": (Scripted.Config(fault="tensor"), "seen as a Tensor, which is no number: return .item() of it"),
    "bool": (Scripted.Config(fault="bool"), "seen as a bool, which is no number"),
    "text": (Scripted.Config(fault="text"), "seen as a str, which is no number"),
    "list": (Scripted.Config(fault="list"), "returned a list: return a dict of numbers, or None"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_no_record_can_have_is_one_error(tmp_path: Path, name: str) -> None:
    observer, message = WRONG[name]
    with pytest.raises(UserError) as caught:
        observed(tmp_path, observer).build().run()
    assert str(caught.value).startswith("observer 0 Scripted returned ") and message in str(caught.value)


def test_two_observers_have_names_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="observers 0 Scripted and 1 Scripted both returned the number seen: rename"):
        observed(tmp_path, Scripted.Config(), Scripted.Config()).build().run()


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    config = observed(tmp_path, Perplexity.Config(decay=0.0), steps=1)
    config.training.steps = 1
    trainer = config.build()
    trainer.observers.named["0 Perplexity"].state["mean"] = float("inf")
    trainer.observers.named["0 Perplexity"].config.decay = 1.0
    trainer.run()
    assert records(trainer.folder)[0]["perplexity"] is None


def test_the_document_has_the_observer_that_is_tested() -> None:
    text = (Path(__file__).parents[3] / "docs/add-an-observer.md").read_text(encoding="utf-8")
    assert inspect.getsource(Perplexity) in text
    assert all(f"`{name}`" in text for name in StepInfo._fields)


def test_the_settings_are_data(tmp_path: Path) -> None:
    config = observed(tmp_path, Perplexity.Config(enough=3.0), Scripted.Config())
    cli.override(config, cli.split_flags(["--observers.0.enough", "2.5"]))
    assert config.observers[0].enough == 2.5
    assert from_json(to_json(config)) == config


def test_an_abstract_class_is_no_observer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^observers\.0: Observer is abstract: choose a class that derives from it, "):
        observed(tmp_path, Observer.Config()).build()


def run_on_ranks(folder: str, rank: int, step: int) -> tuple[int, Record | None]:
    """The last step of a run that one rank's observer asks to stop, and the last record."""
    config = toy_run(Path(folder), steps=6)
    config.training.local_batch_size = 2
    config.observers = [Scripted.Config(stop_on=(rank, step))]
    result: RunResult = config.build().run()
    return len((result.folder / "seen-0").read_text().splitlines()), result.record


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_stop_after_the_step_of_the_one_that_asks(tmp_path: Path, rank: int) -> None:
    toy_run(tmp_path)
    results = run_ranks(run_on_ranks, 2, str(tmp_path), rank, 3)
    assert [(n_steps, record.step) for n_steps, record in results] == [(3, 3), (3, 3)]
    seen = [(tmp_path / f"run/seen-{each}").read_text() for each in range(2)]
    assert seen[0] == seen[1] and len(seen[0].splitlines()) == 3
    assert [each["seen"] for each in records(tmp_path / "run")] == [1, 2, 3]
