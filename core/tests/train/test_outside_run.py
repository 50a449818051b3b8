"""A recipe in a file of the user's own trains on several ranks, goes on from its config.json, and writes text."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from toy_run import toy_run

from core.config import cli
from core.config.errors import UserError
from core.config.outside import NAMED
from core.config.recipe import load_config
from core.generate import command
from core.testing.ranks import run_ranks
from core.train.outcome import trust_options

RECIPES = """
from pathlib import Path

from core.checkpoint.settings import Checkpoint
from core.step.update import StepInfo
from core.train.observers import Observer
from toy_run import toy_run


class Twice(Observer):
    def after_step(self, info: StepInfo) -> dict[str, float]:
        return {"twice": 2 * info.loss}


def tiny():
    config = toy_run(Path(__file__).parent, steps=2)
    config.training.local_batch_size, config.checkpoint = 2, Checkpoint(enable=True)
    config.observers = [Twice.Config()]
    return config
"""
HERE = ModuleType("toy_recipes_of_nobody")


def train(file: str, *words: str) -> tuple[int, list[list[str]]]:
    """Run the command of training on this rank; how many steps the record has, and what a later process is told."""
    cli.main(HERE, ["--config", f"{file}:tiny", *words])
    config = load_config([f"{file}:tiny"], HERE)
    lines = (Path(file).parent / "run/metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["twice"] == 2 * json.loads(line)["loss"] for line in lines)
    return len(lines), trust_options(config, "qwen3.train")


def go_on(folder: str, trust: list[str]) -> int:
    """As the command does that the end of a run prints, in another process; how many steps the record has."""
    with pytest.raises(UserError, match="is code of the module own_recipes, and a file alone"):
        load_config([folder], HERE)
    cli.main(HERE, ["--config", folder, "--dump_folder", folder, "--training.steps", "4", *trust])
    return len((Path(folder) / "metrics.jsonl").read_text().splitlines())


def test_a_recipe_of_a_file_on_two_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    file, folder = tmp_path / "own_recipes.py", tmp_path / "run"
    file.write_text(RECIPES)
    toy_run(tmp_path)  # its text is there before two ranks would write it
    (steps, trust), others = run_ranks(train, 2, str(file))
    assert (steps, trust) == others == (2, [["--trust", str(file)]])
    assert json.loads((folder / "config.json").read_text())["observers"] == [
        {"class": "own_recipes:Twice", "console": False}
    ]
    assert run_ranks(go_on, 2, str(folder), trust[0]) == [4, 4]
    command.main(
        HERE, ["--config", f"{file}:tiny", "--checkpoint", str(folder), "--prompt", "green", "--device", "cpu"]
    )
    assert capsys.readouterr().out.strip()
    del sys.modules["own_recipes"], NAMED["own_recipes"]


def test_nothing_more_is_trusted_than_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NAMED, "own_recipes", "own_recipes.py")
    assert trust_options(toy_run(tmp_path), "qwen3.train") == []  # every class is core's
