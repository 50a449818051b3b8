"""The end of a run: what it returns and says, a run that is finished already, and one that gets more steps."""

import json
import logging
import shlex
import shutil
import sys
from dataclasses import asdict, replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from toy_run import toy_run

from core.config.errors import UserError
from core.config.record import from_json, to_json
from core.runtime.launcher import World
from core.runtime.log import is_live
from core.testing.ranks import run_ranks
from core.testing.toy import Toy
from core.train import trainer as trainer_module
from core.train.metrics import Record, last_record
from core.train.outcome import RunResult, calling_package, command, command_module, goes_on
from core.train.trainer import Trainer

RECORD = Record(
    step=1,
    loss=1.0,
    mtp_loss=None,
    grad_norm=1.0,
    lr=1e-3,
    tokens=8,
    tokens_per_second=1.0,
    step_time_s=1.0,
    memory_gib=1.0,
    mfu=None,
)


def saved_run(folder: Path, *, steps: int = 4, **checkpoint: object) -> Trainer.Config:
    run = toy_run(folder, steps=steps)
    for name, value in {"enable": True, **checkpoint}.items():
        setattr(run.checkpoint, name, value)
    return run


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file but the locks: what stands in it, and when that was written."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def refusal(run: Trainer.Config) -> str:
    with pytest.raises(UserError) as error:
        run.build().run()
    return str(error.value)


def lr_by_hand(step: int, *, n_steps: int, peak: float = 1e-2, warmup: int = 2) -> float:
    """A linear warm-up, then a line that would be 0 one step after the last."""
    return peak * min(step / warmup, (n_steps + 1 - step) / (n_steps - warmup))


def test_a_run_returns_its_last_record_and_its_folder(tmp_path: Path) -> None:
    run = toy_run(tmp_path, steps=2)
    result = run.build().run()
    assert result.folder == tmp_path / "run"
    assert result.record == last_record(tmp_path / "run") and result.record.step == 2


def test_on_a_terminal_the_line_is_there_while_a_run_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(logging.getLogger("armature"), "handlers", [])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown, before = [], trainer_module.open_samples
    monkeypatch.setattr(
        trainer_module, "open_samples", lambda *args, **settings: shown.append(is_live()) or before(*args, **settings)
    )
    trainer = toy_run(tmp_path, steps=1).build()
    assert shown == [True] and not is_live()
    trainer.run()
    assert not is_live()


def test_a_last_checkpoint_that_vanished_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = toy_run(tmp_path, steps=1)
    run.checkpoint.enable = True
    trainer = run.build()
    finish = trainer.checkpoints.finish
    trainer.checkpoints.finish = lambda: (finish(), shutil.rmtree(tmp_path / "run/checkpoint/step-1"))
    trainer.run()
    words = "checkpoint/step-1 was saved by this run and is not whole any more: there is no manifest.json"
    assert words in capsys.readouterr().out


def test_the_last_record_is_the_last_whole_line(tmp_path: Path) -> None:
    assert last_record(tmp_path) is None
    file = tmp_path / "metrics.jsonl"
    rows = [{**asdict(RECORD), "step": step, "moe/max": 1.5} for step in (1, 2)]
    lines = [json.dumps({name: value for name, value in row.items() if name != "numbers"}) for row in rows]
    file.write_text("\n".join([*lines, "[]", "null", '{"step": 3}', lines[0][:-5]]))
    assert last_record(tmp_path) == replace(RECORD, step=2, numbers={"moe/max": 1.5})
    del rows[1]["validation_bits_per_byte"], rows[1]["numbers"]  # an older version's
    file.write_text(json.dumps(rows[1]) + "\n")
    assert last_record(tmp_path) == replace(RECORD, step=2, numbers={"moe/max": 1.5})
    file.write_bytes(b"\xff\n")
    assert last_record(tmp_path) is None


def test_a_trainer_runs_once(tmp_path: Path) -> None:
    trainer = toy_run(tmp_path, steps=1).build()
    trainer.run()
    before = files(tmp_path / "run")
    with pytest.raises(UserError, match="this Trainer has run: build another"):
        trainer.run()
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize("settings", [{}, {"last_save_model_only": True}])
def test_a_finished_run_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict) -> None:
    first = saved_run(tmp_path, **settings).build().run()
    assert "\nfinished 4 steps\n" in capsys.readouterr().out
    before = files(tmp_path / "run")
    trainer = saved_run(tmp_path, **settings).build()
    assert not hasattr(trainer, "built"), "no model is needed to say so"
    assert trainer.run() == first
    assert files(tmp_path / "run") == before
    said = capsys.readouterr().out
    assert said.startswith("finished before, after 4 steps: nothing was changed\n")
    if settings:
        assert f"--checkpoint.initial_load_path {tmp_path / 'run'}\n" in said and "weights alone, " in said
        assert "holds weights alone" in refusal(saved_run(tmp_path, steps=8, **settings))
    else:
        assert "a larger --training.steps goes on\n" in said


def result_of(run: str) -> RunResult:
    return from_json(run).build().run()


def test_ranks_agree_that_a_run_is_finished(tmp_path: Path) -> None:
    run = to_json(saved_run(tmp_path))
    first = run_ranks(result_of, 2, run)
    before = files(tmp_path / "run")
    again = run_ranks(result_of, 2, run)
    assert files(tmp_path / "run") == before
    assert again == [first[0]] * 2 and {result.record.step for result in first} == {4}


def test_a_finished_run_gets_more_steps(tmp_path: Path) -> None:
    saved_run(tmp_path).build().run()
    result = saved_run(tmp_path, steps=8).build().run()
    assert result.record.step == 8 and result.record.tokens == 8 * 4 * 16
    assert (tmp_path / "run/checkpoint/step-8/manifest.json").exists()
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(1, 9))
    for record in records:
        n_steps = 4 if record["step"] <= 4 else 8
        assert record["lr"] == pytest.approx(lr_by_hand(record["step"], n_steps=n_steps), rel=1e-12)


def test_a_run_that_was_stopped_keeps_its_steps(tmp_path: Path) -> None:
    run = saved_run(tmp_path, interval=2)
    run.build().run()
    assert "training.steps 4 -> 8" in refusal(saved_run(tmp_path, steps=8, interval=2, load_step=2))


def test_a_finished_run_of_another_folder_leaves_nothing_to_train(tmp_path: Path) -> None:
    saved_run(tmp_path).build().run()
    again = saved_run(tmp_path, initial_load_path=str(tmp_path / "run"), initial_load_model_only=False)
    again.dump_folder = str(tmp_path / "other")
    assert "step-4 is of step 4, and the last step is 4: nothing is left to train" in refusal(again)


def test_without_checkpoints_the_setting_that_saves_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_run(tmp_path, steps=1).build().run()
    assert "weights were not saved: --checkpoint.enable saves them\n" in capsys.readouterr().out


def words(text: str) -> list[str]:
    """The words of a command that may lie over several lines."""
    return shlex.split(text.replace("\\\n", ""))


def told(run: Trainer.Config, world: World, *, step: int, left: int) -> list[tuple[str, str]]:
    found = goes_on(run, "toy.train", world, Path("outputs/a run"), step, left)
    return [(purpose, command(groups)) for purpose, groups in found]


def test_how_a_run_goes_on() -> None:
    run = Trainer.Config(model=Toy.Config())
    run.training.steps = 400
    place = "--config 'outputs/a run' --dump_folder 'outputs/a run'"
    [(purpose, text)] = told(run, World(), step=400, left=0)
    assert purpose == "go on, to step 800"
    assert words(text) == words(f"python -m toy.train {place} --training.steps 800")
    assert max(map(len, text.splitlines())) <= 60 and text.count(" \\\n") == len(text.splitlines()) - 1
    [(purpose, text)] = told(run, World(0, 4, 0, 4), step=100, left=300)
    assert purpose == "go on"
    assert words(text) == words(f"torchrun --nproc-per-node 4 -m toy.train {place}")
    [(purpose, _)] = told(run, World(0, 4, 0, 2), step=100, left=300)
    assert purpose == "go on (behind your launcher, on 4 ranks)"
    assert told(run, World(), step=300, left=0) == [], "the data came to their end, more steps would find none"
    run.checkpoint.resume, run.checkpoint.load_step = "never", 100
    [(_, text)] = told(run, World(), step=200, left=200)
    assert words(text)[-4:] == ["--checkpoint.resume", "auto", "--checkpoint.load_step", "-1"]


def test_the_commands_are_of_the_package_that_was_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, modules in {"mine_a": ("train", "generate"), "theirs_a": ("train", "generate", "convert")}.items():
        (tmp_path / name).mkdir()
        for module in modules:
            (tmp_path / name / f"{module}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec("mine_a.train", None))
    packages = [calling_package(), "theirs_a"]
    found = [command_module(name, packages) for name in ("generate", "train", "convert", "evaluate")]
    assert found == ["mine_a.generate", "mine_a.train", "theirs_a.convert", ""]
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec("pytest.__main__", None))
    assert calling_package() == "" and command_module("train", [calling_package(), ""]) == ""
