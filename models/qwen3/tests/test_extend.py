"""docs/extend.md: its experiment runs, is planned, and does what it says; every page has a file that works."""

import re
from pathlib import Path

import pytest
import torch

from core.checkpoint.settings import Checkpoint
from core.config import cli
from core.config.recipe import load_config
from core.testing.document import commands, fences, shown_files
from qwen3 import configs

DOCS = Path(__file__).parents[3] / "docs"
PAGE = DOCS / "extend.md"
LONGEST = 40
"""Lines that are not empty."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extend")
    for name, text in shown_files(PAGE).items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def file(place: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(place)
    return "noisy.py:noisy_debug"


def test_the_experiment_shakes_the_weights_as_it_says(file: str, tmp_path: Path) -> None:
    moved = {}
    for noise in (0.0, 0.01):
        config = load_config([file], configs)
        config.noise, config.optimizer.lr = noise, 0.0
        config.training.steps, config.training.seq_len, config.training.local_batch_size = 2, 32, 2
        config.model.n_layers, config.training.device, config.validator.enable = 1, "cpu", False
        config.checkpoint, config.lr_scheduler.warmup_steps = Checkpoint(), 0
        config.dump_folder = str(tmp_path / f"run-{noise}")
        trainer = config.build()
        before = {name: weight.detach().clone() for name, weight in trainer.built.named_parameters()}
        trainer.run()
        moved[noise] = torch.cat([(w - before[name]).flatten() for name, w in trainer.built.named_parameters()])
    assert not moved[0.0].any()
    expected = 0.01 * sum(trainer.schedule.factor(step) ** 2 for step in (1, 2)) ** 0.5
    assert moved[0.01].std().item() == pytest.approx(expected, rel=0.02)


def test_its_commands_are_what_they_seem(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    train, plan = commands(PAGE)
    assert file in train and file in plan and train[:3] == ["python", "-m", "qwen3.train"]
    config = load_config([file], configs)
    cli.main(configs, [*plan[3:], "--model.n_layers", "2"])
    assert capsys.readouterr().out.startswith(f"{config.recipe}: rank 0 of 8 in one step")


def test_every_page_has_a_file_of_few_lines() -> None:
    pages = re.findall(r"^\| an? [\w ]+ \| \[([\w-]+\.md)\]", PAGE.read_text(), re.MULTILINE)
    assert len(pages) == 6
    for page in (PAGE, *(DOCS / page for page in pages)):
        text = next(text for language, _, text in fences(page) if language == "python")
        compile(text, str(page), "exec")
        assert len([line for line in text.splitlines() if line]) <= LONGEST, page.name
