"""The observer that measures while a model trains, against the command on what was saved."""

import json
from pathlib import Path
from typing import Any

import evaluated_recipes
import pytest

from core.config.errors import UserError
from core.data.text import IndexedText
from core.evaluate.command import main
from core.evaluate.observer import Evaluator
from core.runtime.records import read_records
from core.step.settings import Training
from core.train.trainer import Trainer

TEXT = "One green bottle, hanging on the wall.\n" * 8


def run(folder: Path, observers: list[Any]) -> list[dict[str, Any]]:
    text = folder / "text"
    if not text.exists():
        text.mkdir()
        for n in range(40):
            (text / f"{n:02}.txt").write_text(f"{n} green bottles hanging on the wall\n" * 4)
        (folder / "held out.txt").write_text(TEXT)
    config: Trainer.Config = evaluated_recipes.toy()
    config.dump_folder = str(folder / f"run {len(observers)}")
    config.dataloader = IndexedText.Config(dataset=str(text), cache_folder=str(folder / "cache"))
    config.training = Training(steps=4, seq_len=16, local_batch_size=2)
    config.lr_scheduler.warmup_steps = 0
    config.metrics.log_freq, config.checkpoint.enable, config.observers = 1, True, observers
    _, place = config.build().run()
    return read_records(place)


def test_it_measures_what_the_command_measures_and_changes_nothing(tmp_path, capsys):
    plain = run(tmp_path, [])
    file = tmp_path / "held out.txt"
    records = run(tmp_path, [Evaluator.Config(freq=2, perplexity=[str(file)])])
    assert [record["loss"] for record in records] == [record["loss"] for record in plain]
    found = [record.get("eval/held out/bits_per_byte") for record in records]
    assert found[0] is found[2] is None and found[3] < found[1]
    words = ["--checkpoint", str(tmp_path / "run 1"), "--perplexity", str(file), "--out", str(tmp_path / "found.json")]
    main(evaluated_recipes, ["--config", "toy", *words])
    expected = json.loads((tmp_path / "found.json").read_text())["perplexity"][str(file)]
    assert found[3] == pytest.approx(expected["bits_per_byte"], rel=1e-6)
    assert records[3]["eval/held out/nats_per_token"] == pytest.approx(expected["nats_per_token"], rel=1e-6)


def test_mistakes_are_said_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match="nothing to measure"):
        run(tmp_path, [Evaluator.Config()])
    with pytest.raises(UserError, match="nowhere.txt cannot be read"):
        run(tmp_path, [Evaluator.Config(perplexity=["nowhere.txt"])])
