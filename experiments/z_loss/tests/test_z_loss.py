"""The z-loss: worked out by hand, equal on two ranks, planned as it is trained, and with the effect that is claimed."""

import json
from pathlib import Path

import pytest
import torch

from core.checkpoint.settings import Checkpoint
from core.config import cli
from core.config.errors import UserError
from core.config.recipe import load_config, recipes
from core.config.record import diff, from_json
from core.config.validate import validate
from core.data.packing import IGNORE
from core.nn.attention import Attention
from core.nn.feed_forward import FeedForward
from core.parallel.settings import Parallelism
from core.testing.parity import Case, compare
from core.train.trainer import Trainer
from qwen3.configs import qwen3_0_6b, qwen3_debug
from z_loss import configs
from z_loss.loss import ZLoss
from z_loss.trainer import ZLossTrainer

LAYOUTS = {"fsdp2": Parallelism(), "tp2": Parallelism(tensor_parallel_degree=2)}


def tiny_run(folder: Path, weight: float, *, steps: int) -> ZLossTrainer.Config:
    """The debug run with a small model, on a text of one page."""
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for n in range(60):
        (text / f"{n:02}.txt").write_text(f"{n} green bottles hanging on the wall, and if one should fall\n" * 3)
    config = configs.z_loss_debug()
    config.loss.weight = weight
    config.model.dim, config.model.n_layers = 64, 2
    config.dataloader.dataset, config.dataloader.cache_folder = str(text), str(folder / "cache")
    config.training.steps, config.training.seq_len, config.training.device = steps, 32, "cpu"
    config.validator.enable, config.checkpoint, config.metrics.log_freq = False, Checkpoint(), 1
    config.lr_scheduler.decay_ratio = 0.0
    config.dump_folder = str(folder / f"run-{weight}")
    return config


def step_losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@torch.no_grad()
def parts_of_loss(trainer: Trainer, step: int) -> tuple[float, float]:
    """Cross-entropy, and the mean square of the log-partition, of a step, by a formula in double precision."""
    (model,) = trainer.built.models
    nats, squares, count = 0.0, 0.0, 0
    for batch in trainer.batches(step):
        logits_BLV = model(batch.tokens_BL).double()
        z_BL = logits_BLV.exp().sum(-1).log()
        valid_BL = batch.labels_BL != IGNORE
        picked_BL = logits_BLV.gather(-1, batch.labels_BL.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        nats += (z_BL - picked_BL)[valid_BL].sum().item()
        squares += z_BL[valid_BL].square().sum().item()
        count += int(valid_BL.sum())
    return nats / count, squares / count


def test_the_loss_of_a_step_is_that_of_the_formula(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, 0.1, steps=1)
    config.training.mask = "causal"
    trainer = config.build()
    nats, square = parts_of_loss(trainer, 1)
    trainer.run()
    assert step_losses(trainer.folder) == [pytest.approx(nats + 0.1 * square, rel=1e-5)]
    assert square > 10  # of 2,048 words alike, z is 7.6


def test_it_draws_the_log_partition_to_zero(tmp_path: Path) -> None:
    squares = {}
    for weight in (0.0, 1.0):
        trainer = tiny_run(tmp_path, weight, steps=20).build()
        trainer.run()
        losses = step_losses(trainer.folder)
        assert losses[-1] < losses[0] - 1
        squares[weight] = parts_of_loss(trainer, 20)[1]
    assert squares[1.0] < 0.7 * squares[0.0], squares


@pytest.mark.layout
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_on_two_ranks_equals_one_rank(layout: str) -> None:
    model = qwen3_debug().model
    model.dim, model.n_layers, model.vocab_size = 32, 2, 61  # 61 words are no multiple of two ranks
    model.attention = Attention.Config(n_heads=4, n_kv_heads=2, head_dim=8, qk_norm=True)
    model.feed_forward = FeedForward.Config(hidden_dim=48)
    case = Case(model, LAYOUTS[layout], loss=ZLoss.Config(weight=0.1), world_size=2, local_batch_size=2)
    worst = compare(case)
    assert worst["loss"] < 1e-6 and worst["gradient"] < 1e-5 and worst["next loss"] < 1e-5


def test_a_dry_run_plans_the_experiment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []
    of_tokens = ZLoss.of_tokens
    monkeypatch.setattr(
        ZLoss, "of_tokens", lambda self, *args: asked.append(self.config.weight) or of_tokens(self, *args)
    )
    cli.main(configs, ["--config", "z_loss_debug", "--dry-run", "--world-size", "2", "--loss.weight", "0.5"])
    assert capsys.readouterr().out.startswith("z_loss_debug: rank 0 of 2") and set(asked) == {0.5}


def test_recipes_differ_from_those_that_they_are_derived_from_in_the_loss() -> None:
    """Whatever Qwen3's recipes become: their golden files say what that is."""
    derived = {"z_loss_debug": (qwen3_debug, 1e-3), "z_loss_qwen3_0_6b": (qwen3_0_6b, 1e-4)}
    assert recipes(configs).keys() == derived.keys()
    for name, recipe in recipes(configs).items():
        config, (base, weight) = recipe(), derived[name]
        validate(config)
        found = {path: value for path, _, value in diff(config, base()) if value is not ...}
        assert found == {"class": "z_loss.trainer:ZLossTrainer", "loss.weight": weight}


def test_a_run_without_the_loss_is_no_run_of_this_experiment(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, 0.0, steps=1)
    config.loss = qwen3_debug().loss
    with pytest.raises(UserError, match=r"loss: expected ZLoss\.Config, got CrossEntropy\."):
        config.build()
    with pytest.raises(UserError, match=r"loss\.weight: weight -1\.0 must be finite and not negative"):
        tiny_run(tmp_path, -1.0, steps=1).build()


def test_a_run_goes_on_from_its_record(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, 0.1, steps=2)
    config.checkpoint = Checkpoint(enable=True)
    config.build().run()
    folder = Path(config.dump_folder or "")
    again = load_config([str(folder)], configs)
    assert isinstance(again, ZLossTrainer.Config) and again.loss == ZLoss.Config(weight=0.1)
    assert again == from_json((folder / "config.json").read_text())
    again.training.steps = 3
    again.build().run()
    assert len(step_losses(folder)) == 3
