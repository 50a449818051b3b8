"""A disk that fails under what a run writes beside its checkpoints: before the first step that is an error, and
afterwards nothing but a checkpoint ends the run."""

import json
import os
import shutil
from collections.abc import Callable
from errno import EDQUOT, EIO, ENOSPC, EROFS
from pathlib import Path

import pytest
from faulty_disk import Point, watched_disk
from faulty_run import saved_run

from core.config.errors import UserError
from core.train import trainer as trainer_module
from core.train.trainer import Trainer

ERRORS = (ENOSPC, EDQUOT, EROFS, EIO)
STEPS = [1, 2, 3, 4]


def error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Ended:
    """How a run ended on a disk: its error if there was one, and at which point its first step began."""

    def __init__(self, run: Trainer.Config, fails: Callable[[Point], OSError | None]) -> None:
        self.folder = Path(str(run.dump_folder))
        self.first, self.error, self.loss = 0, None, None
        train_step = trainer_module.train_step

        def step(*args: object, **settings: object) -> object:
            self.first = self.first or len(self.points) + 1
            return train_step(*args, **settings)

        with pytest.MonkeyPatch.context() as patch, watched_disk(self.folder, fails) as self.points:
            patch.setattr(trainer_module, "train_step", step)
            try:
                record = run.build().run().record
                assert record is not None
                self.loss = record.loss
            except UserError as error:
                self.error = str(error)

    def records(self) -> list[int]:
        file = self.folder / "metrics.jsonl"
        return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []

    def events(self) -> list[int]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.folder / "tb"))
        events.Reload()
        return [event.step for event in events.Scalars("train/loss")]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Where the text is, tokenised once."""
    return tmp_path_factory.mktemp("text")


@pytest.fixture
def run(text, tmp_path) -> Trainer.Config:
    """A run that writes all that there is, but checkpoints."""
    run = saved_run(text, n_steps=4)
    run.dump_folder = str(tmp_path / "run")
    run.checkpoint.enable = False
    run.metrics.enable_tensorboard = run.debug.log_every_rank = True
    return run


@pytest.fixture
def whole(run) -> Ended:
    """That run on a good disk."""
    ended = Ended(run, lambda point: None)
    assert ended.error is None and ended.records() == ended.events() == STEPS
    shutil.rmtree(ended.folder)
    return ended


def check_folder(folder: Path) -> None:
    """No file is half of one."""
    if (folder / "config.json").exists():
        json.loads((folder / "config.json").read_text())
    assert not [path for path in folder.rglob("*") if path.name.endswith((".growing", ".tmp"))]


def check_one_failure(run: Trainer.Config, whole: Ended, point: Point, number: int, said: Callable[[], str]) -> None:
    """At one point the disk fails once."""
    ended = Ended(run, lambda other: error(number) if other.number == point.number else None)
    out = said()
    check_folder(ended.folder)
    if ended.error is not None:
        assert point.number < whole.first, (point, ended.error)
        assert os.strerror(number) in ended.error and "\n" not in ended.error and str(ended.folder) in ended.error
    else:  # what grows and is not there yet may wait before the first step, too
        assert ended.loss == whole.loss and ended.records() == ended.events() == STEPS, point
        n_told = int(point.call != "mkdir")  # of a folder that is there already
        assert out.count("warning: ") == n_told, (point, out)
        assert out.count(" is written again\n") == n_told or point.call == "trace", (point, out)
    shutil.rmtree(ended.folder, ignore_errors=True)


@pytest.mark.parametrize("part", [0, 1])
def test_a_disk_that_fails_once(run, whole, capsys, part):
    """At some of the points; at all of them in `nox -s faults`."""
    chosen = whole.points[: whole.first - 1 : 5] if part == 0 else whole.points[whole.first - 1 :: 9]
    for point in chosen:
        check_one_failure(run, whole, point, ENOSPC, lambda: capsys.readouterr().out)


@pytest.mark.faults
@pytest.mark.parametrize("number", ERRORS)
def test_a_disk_that_fails_once_at_any_point(run, whole, capsys, number):
    run.profiling.enable_profiling = True
    run.profiling.profile_freq, run.profiling.profiler_warmup = 2, 1
    whole = Ended(run, lambda point: None)
    shutil.rmtree(whole.folder)
    for point in whole.points:
        check_one_failure(run, whole, point, number, lambda: capsys.readouterr().out)
    print(f"{len(whole.points)} points, {whole.first - 1} of them before the first step")


def test_a_disk_that_is_full_from_the_first_step_on(run, whole, capsys):
    run.profiling.enable_profiling = True
    run.profiling.profile_freq, run.profiling.profiler_warmup = 2, 1
    begun = []
    step = Trainer.step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", lambda trainer, number: (begun.append(number), step(trainer, number))[1])
        ended = Ended(run, lambda point: error(ENOSPC) if begun else None)
    assert (ended.error, ended.loss) == (None, whole.loss) and ended.records() == []
    out = capsys.readouterr().out
    warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
    names = ("events.jsonl", "logs/rank-0.log", "metrics.jsonl", "profile_traces", "tb/events.out.tfevents")
    for name, line in zip(names, sorted(line for line in warnings if "cannot be written: " in line), strict=True):
        assert line.startswith(f"warning: {ended.folder}/{name}") and line.endswith("; the run goes on without it")
    missing = {line.rpartition("/")[2][:9]: line.split()[1] for line in warnings if "records are missing in" in line}
    assert missing["metrics.j"] == missing["events.ou"] == "4" and missing["events.js"] == "1" and len(missing) == 4


@pytest.mark.faults
@pytest.mark.parametrize(("number", "checkpoints"), [(ENOSPC, False), (EROFS, True)])
def test_a_disk_that_fails_from_any_point_on(run, whole, number, checkpoints):
    """With checkpoints it is they who end the run, and never before one that cannot be saved."""
    run.checkpoint.enable = checkpoints
    whole = Ended(run, lambda point: None)
    shutil.rmtree(whole.folder)
    for first in range(1, len(whole.points) + 1):
        ended = Ended(run, lambda point, first=first: error(number) if point.number >= first else None)
        if ended.error is None:
            assert ended.loss == whole.loss and first >= whole.first
        else:
            assert "\n" not in ended.error and os.strerror(number) in ended.error
            assert first < whole.first or (checkpoints and "could not be saved" in ended.error)
        shutil.rmtree(ended.folder, ignore_errors=True)
