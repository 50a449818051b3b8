"""docs/own-package.md: the package that it shows, as it stands there, trains, goes on, writes, and counts as told."""

import json
import math
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from core.config import cli
from core.config.recipe import load_config
from core.generate.command import main as generate
from core.testing.document import commands, shown_files

DOCUMENT = Path(__file__).parents[3] / "docs/own-package.md"
SHORT = "--training.seq_len 32 --training.local_batch_size 2 --validator.no-enable --metrics.log_freq 1".split()
WARM = "--lr_scheduler.warmup_steps 1 --lr_scheduler.decay_ratio 0".split()


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The recipes of the package, which lies in the working directory and can be imported."""
    for name, text in shown_files(DOCUMENT).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "mine/src")
    monkeypatch.chdir(tmp_path)
    yield import_module("mine.configs")
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


def run_of(configs: ModuleType, recipe: str, *words: str) -> Any:
    run = load_config([recipe], configs)
    cli.override(run, cli.split_flags([*SHORT, *WARM, *words]))
    return run


def weights(configs: ModuleType, *words: str) -> dict[str, torch.Tensor]:
    """The weights at the end of a run with the package's optimizer."""
    trainer = run_of(configs, "mine_qwen3", *words).build()
    trainer.run()
    return {name: weight.detach().clone() for name, weight in trainer.built.named_parameters()}


def test_the_optimizer_is_signum(configs: ModuleType) -> None:
    start = run_of(configs, "mine_qwen3", "--training.steps", "1", "--dump_folder", "start").build()
    began = {name: weight.detach().clone() for name, weight in start.built.named_parameters()}
    start.run()
    gradients = {name: state["mean"] / (1 - 0.9) for name, state in start.optimizer.state.items()}
    for name, weight in start.built.named_parameters():
        decay = 0.0 if name.endswith("norm.weight") else 0.1
        expected = began[name] * (1 - 1e-3 * decay) - 1e-3 * gradients[name].sign()
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)


def test_a_run_that_goes_on_has_the_same_bits(configs: ModuleType) -> None:
    words = ["--training.steps", "4", "--checkpoint.interval", "2"]
    whole = weights(configs, *words, "--dump_folder", "whole")
    from_here = ["--checkpoint.initial_load_path", "whole/checkpoint/step-2", "--checkpoint.no-initial_load_model_only"]
    parts = weights(configs, *words, "--dump_folder", "parts", *from_here)
    assert len(Path("parts/metrics.jsonl").read_text().splitlines()) == 2
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_the_metric_is_in_every_record(configs: ModuleType) -> None:
    weights(configs, "--training.steps", "2", "--dump_folder", "run")
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2 and [record["perplexity"] for record in records] == [
        pytest.approx(math.exp(record["loss"])) for record in records
    ]


def test_the_model_trains_and_writes(configs: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = run_of(configs, "mine_debug", "--training.steps", "3", "--dump_folder", "run").build()
    x_BLD = torch.randn(2, 3, 128)
    network = trainer.built.models[0].layers["0"].feed_forward
    by_hand = (x_BLD @ network.w1.weight.T).clamp(min=0) ** 2 @ network.w2.weight.T
    torch.testing.assert_close(network(x_BLD), by_hand)
    trainer.run()
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < records[0]["loss"]
    capsys.readouterr()
    generate("mine.configs", "--checkpoint run --prompt def --max-new-tokens 3 --temperature 0".split())
    assert capsys.readouterr().out.strip()


def test_the_commands_are_of_this_package() -> None:
    first, second, *others = commands(DOCUMENT)
    assert first == ["pip", "install", "armature/core", "armature/models/qwen3"]
    assert second == ["pip", "install", "--editable", "mine"]
    for words in others:
        module = words[words.index("-m") + 1]
        assert f"mine/src/{module.replace('.', '/')}.py" in shown_files(DOCUMENT)
