"""Frozen weights in a run that is saved and resumed, in the estimate of memory and in a plan."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from toy_run import toy_run

from core.checkpoint.settings import Checkpoint
from core.config.record import from_json, to_json
from core.optim.groups import Group
from core.plan.plan import plan
from core.runtime.meta import meta_model
from core.testing.toy import Toy
from core.train.memory import estimate
from core.train.trainer import Trainer


def frozen_run(folder: Path, **settings: Any) -> Trainer.Config:
    run = toy_run(folder, **settings)
    run.optimizer.groups = [Group(pattern="layers.0.*", frozen=True), Group(pattern="tok_embeddings.*", frozen=True)]
    return run


def is_frozen(name: str) -> bool:
    return name.startswith(("layers.0.", "tok_embeddings."))


def test_frozen_weights_stay_and_have_neither_gradient_nor_state(tmp_path: Path) -> None:
    run = frozen_run(tmp_path)
    run.checkpoint = Checkpoint(enable=True, interval=2)
    whole: Trainer = run.build()
    before = {name: weight.detach().clone() for name, weight in whole.built.named_parameters()}
    whole.run()
    after = dict(whole.built.named_parameters())
    assert {name for name in after if torch.equal(after[name], before[name])} == set(filter(is_frozen, after))
    assert {name for name, weight in after.items() if weight.grad is None} == set(filter(is_frozen, after))
    assert whole.optimizer.state.keys() == {name for name in after if not is_frozen(name)}
    again = from_json(to_json(run), Trainer.Config)
    again.dump_folder = str(tmp_path / "again")
    again.checkpoint.initial_load_path, again.checkpoint.initial_load_model_only = (
        f"{run.dump_folder}/checkpoint/step-2",
        False,
    )
    other: Trainer = again.build()
    other.run()
    assert all(torch.equal(weight, after[name]) for name, weight in other.built.named_parameters())


def test_estimate_and_plan_count_no_gradient_and_no_state_of_frozen_weights() -> None:
    run = Trainer.Config(model=Toy.Config(vocab_size=64, n_layers=9))
    run.training = replace(run.training, device="cpu", seq_len=16, local_batch_size=2)
    run.optimizer.groups = [Group(pattern="layers.0.*", frozen=True), Group(pattern="tok_embeddings.*", frozen=True)]
    named = dict(meta_model(run.model).named_parameters())
    trained = sum(4 * weight.numel() for name, weight in named.items() if not is_frozen(name))
    counts = 4 * sum(not is_frozen(name) for name in named)
    found = plan(run, world_size=1, rank=0)
    assert (found.gradients_bytes, found.optimizer_bytes) == (trained, 2 * trained + counts)
    assert found.weights_bytes == sum(4 * weight.numel() for weight in named.values())
    need = estimate(meta_model(run.model), run.optimizer, run.loss, run.training)
    assert (need.weights, need.gradients, need.optimizer) == (found.weights_bytes, trained, 2 * trained + counts)
