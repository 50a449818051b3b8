"""docs/extend.md: its experiment runs, is planned, and does what it says; every page has a file that works."""

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.checkpoint.settings import Checkpoint
from core.config import cli
from core.config.recipe import load_config
from core.config.record import from_json
from core.data.text import IndexedText
from core.nn.backends import KERNELS
from core.testing.document import commands, fences, shown_files
from core.testing.parity import full
from core.testing.ranks import run_ranks
from qwen3 import configs

DOCS = Path(__file__).parents[3] / "docs"
PAGE = DOCS / "extend.md"
LONGEST = 40
"""Lines, empty ones among them."""


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


def shaken(file: str, noise: float, folder: str) -> torch.Tensor:
    """What two steps of the experiment, whose learning rate is 0, add to all weights, one behind the other."""
    config = load_config([file], configs)
    config.noise, config.optimizer.lr = noise, 0.0
    config.training.steps, config.training.seq_len, config.training.local_batch_size = 2, 32, 2
    config.model.n_layers, config.training.device, config.validator.enable = 1, "cpu", False
    config.checkpoint, config.lr_scheduler.warmup_steps = Checkpoint(), 0
    config.dump_folder = folder
    trainer = config.build()
    before = {name: full(weight.detach()).clone() for name, weight in trainer.built.named_parameters()}
    trainer.run()
    after = {name: full(weight.detach()) for name, weight in trainer.built.named_parameters()}
    return torch.cat([(after[name] - before[name]).flatten() for name in before])


def test_the_experiment_shakes_the_weights_as_it_says(file: str, tmp_path: Path) -> None:
    assert not shaken(file, 0.0, str(tmp_path / "still")).any()
    moved = shaken(file, 0.01, str(tmp_path / "moved"))
    config = load_config([file], configs)
    config.lr_scheduler.warmup_steps = 0
    factor = config.lr_scheduler.build(steps=2).factor
    assert moved.std().item() == pytest.approx(0.01 * sum(factor(step) ** 2 for step in (1, 2)) ** 0.5, rel=0.02)


@pytest.mark.layout
def test_ranks_shake_the_weights_as_one_does(file: str, place: Path, tmp_path: Path) -> None:
    alone = shaken(file, 0.01, str(tmp_path / "alone"))
    absolute = f"{place}/{file}"
    for moved in run_ranks(shaken, 2, absolute, 0.01, str(tmp_path / "both"), timeout_s=120.0):
        torch.testing.assert_close(moved, alone, rtol=0, atol=1e-7)


def test_its_commands_are_what_they_seem(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    train, plan = commands(PAGE)
    assert file in train and file in plan and train[:3] == ["python", "-m", "qwen3.train"]
    config = load_config([file], configs)
    cli.main(configs, [*plan[3:], "--model.n_layers", "2"])
    assert capsys.readouterr().out.startswith(f"{config.recipe}: rank 0 of 8 in one step")


def test_every_page_has_a_file_of_few_lines() -> None:
    pages = re.findall(r"^\| an? [\w ]+ \| \[([\w-]+\.md)\]", PAGE.read_text(), re.MULTILINE)
    assert pages == [f"{page}.md" for page in PAGES]
    for page in (PAGE, *(DOCS / page for page in pages)):
        texts = [text for language, _, text in fences(page) if language == "python"]
        assert texts and all(len(text.splitlines()) <= LONGEST for text in texts), page.name


PAGES = {
    "add-an-observer": ["Perplexity"],
    "add-a-loss": ["Focal"],
    "add-an-optimizer": ["Orthogonal"],
    "add-a-converter": ["SteppedConverter"],
    "add-a-data-source": ["NpyRows", "Chapters"],
    "add-a-kernel": ["Tiled"],
}
"""The classes of each page's files, in the order of the table."""


@pytest.mark.parametrize("page", PAGES)
def test_a_run_with_the_files_of_a_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of the page as it stands, imports and all, chosen by the line that the page gives for a recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(KERNELS, "tiled", raising=False)  # a test of core may have one of this name
    np.save("rows.npy", np.arange(8 * 33, dtype=np.int32).reshape(8, 33))
    Path("book").write_text("".join(f"# {n}\nIt was a dark night, and the {n} lamps were out.\n" for n in range(40)))
    files = [text for language, _, text in fences(DOCS / f"{page}.md") if language == "python"]
    chosen = re.findall(r"`(config\.\w+ = [^`]+)`", (DOCS / f"{page}.md").read_text())
    chosen = chosen or ['config.model.attention.backend = "tiled"']
    for number, (name, text, choice) in enumerate(zip(PAGES[page], files, chosen, strict=True)):
        module = f"of_{page.replace('-', '_')}_{number}"
        Path(f"{module}.py").write_text(text)
        importlib.invalidate_caches()
        calls = counted_calls(getattr(importlib.import_module(module), name), monkeypatch)
        config: Any = configs.qwen3_debug()
        config.training.steps, config.training.seq_len, config.training.local_batch_size = 2, 32, 2
        config.model.n_layers, config.training.device, config.validator.enable = 1, "cpu", False
        config.dataloader.cache_folder, config.dump_folder = str(tmp_path / "cache"), str(tmp_path / f"run-{number}")
        exec(choice, {"config": config, "IndexedText": IndexedText, **vars(importlib.import_module(module))})
        record, folder = config.build().run()
        assert 0 < record.loss < 20 and record.step == 2 and calls, choice
        assert from_json((Path(folder) / "config.json").read_text(), type(config), trust=[module]) is not None


def counted_calls(kind: type, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list to which every call of a method that a class itself defines adds its name."""
    calls: list[str] = []
    for name, method in list(vars(kind).items()):
        if callable(method) and not isinstance(method, type) and (name == "__call__" or not name.startswith("__")):

            def counting(*args: Any, name: str = name, method: Any = method, **kwargs: Any) -> Any:
                calls.append(name)
                return method(*args, **kwargs)

            monkeypatch.setattr(kind, name, counting)
    return calls
