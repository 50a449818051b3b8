"""Means of weights over steps: their definition, validation by them, a run that is resumed, and an export."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from toy_run import toy_run, train_until

from core.checkpoint.settings import Checkpoint
from core.config.errors import UserError
from core.config.validate import validate
from core.nn.start import Constant
from core.nn.weights import Weight
from core.optim.sgd import SGD
from core.parallel.layout import SingleRank
from core.testing.toy import Toy
from core.train.trainer import Trainer
from core.train.validate import Validator
from core.weights.convert import to_hf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mean_weighs_each_step_by_its_age(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(4, 3, dtype=dtype))
    config = SGD.Config(lr=1.0, momentum=0.0, weight_decay=0.0, ema_decay=0.8)
    named = [Weight("w.weight", weight, ("ffn", "embed"), Constant(0.0))]
    optimizer = config.build(weights=named, layout=SingleRank(torch.device("cpu")))
    seen: list[Tensor] = []
    for step in range(1, 6):
        weight.grad = torch.full_like(weight, step / 8)  # whatever is rounded here is exact in bfloat16
        optimizer.step(1.0, step)
        seen.append(weight.detach().double().clone())
    ages = [0.8**age for age in reversed(range(5))]
    expected = sum(age * value for age, value in zip(ages, seen, strict=True)) / sum(ages)
    torch.testing.assert_close(optimizer.state["w.weight"]["ema"].double(), expected, rtol=1e-6, atol=1e-6)
    with optimizer.averaged():
        torch.testing.assert_close(weight.detach().double(), expected.to(dtype).double(), rtol=1e-6, atol=1e-6)
    assert torch.equal(weight.detach().double(), seen[-1])


def ema_run(folder: Path, name: str, **validator: Any) -> Trainer.Config:
    run = toy_run(folder, steps=4)
    run.dump_folder = str(folder / name)
    run.checkpoint = Checkpoint(enable=True, interval=2)
    run.validator = Validator.Config(enable=True, freq=2, steps=1, **validator)
    return run


def go(run: Trainer.Config, leaves_at: int = 0) -> Trainer:
    trainer: Trainer = run.build()
    train_until(trainer, leaves_at)
    return trainer


def test_a_run_validates_saves_and_exports_means(tmp_path: Path) -> None:
    plain = go(ema_run(tmp_path, "plain"))
    run = ema_run(tmp_path, "ema", use_ema=True)
    run.optimizer.ema_decay = 0.7
    whole = go(run)
    weights = dict(whole.built.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in plain.built.named_parameters())
    means = {name: state["ema"].clone() for name, state in whole.optimizer.state.items()}
    assert whole.validator is not None and plain.validator is not None and whole.report.last is not None
    with torch.no_grad():
        for name, weight in plain.built.named_parameters():
            weight.copy_(means[name])
    found = plain.validator.measure(lambda: False)
    assert found is not None and whole.report.last.validation_loss == found.loss

    run.dump_folder = str(tmp_path / "parts")
    go(run, leaves_at=3)
    parts = go(run)
    assert all(torch.equal(state["ema"], means[name]) for name, state in parts.optimizer.state.items())

    to_hf({"toy": Toy}, Path(run.dump_folder), tmp_path / "hf", dtype=None, shard_gib=5.0, trust=[], ema=True)
    exported = load_file(tmp_path / "hf/model.safetensors")
    assert torch.equal(exported["head.weight"], means["output.weight"])
    assert not torch.equal(means["output.weight"], weights["output.weight"])
    with pytest.raises(UserError, match="has no means of weights over steps: train with --optimizer.ema_decay"):
        to_hf({"toy": Toy}, tmp_path / "plain", tmp_path / "no", dtype=None, shard_gib=5.0, trust=[], ema=True)


def test_means_that_nobody_keeps_are_not_validated(tmp_path: Path) -> None:
    run = ema_run(tmp_path, "run", use_ema=True)
    with pytest.raises(UserError, match="validator.use_ema: use_ema measures means of the weights that nobody keeps"):
        validate(run)
    run.optimizer.ema_decay = 1.0
    with pytest.raises(UserError, match="optimizer.ema_decay: ema_decay 1.0 must be between 0 and 1"):
        validate(run)
