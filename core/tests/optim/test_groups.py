"""Groups of weights against PyTorch's groups, and patterns and settings of groups that are wrong."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from core.config.errors import UserError
from core.config.validate import validate
from core.nn.start import Constant
from core.nn.weights import Weight
from core.optim.adam import AdamW
from core.optim.groups import Group
from core.optim.muon import Muon
from core.optim.optimizer import Optimizer
from core.parallel.layout import SingleRank
from core.parallel.settings import Parallelism
from core.runtime.meta import meta_model
from core.step.checks import check_optimizer, check_stages
from core.testing.toy import Toy
from core.train.trainer import Trainer

CPU = torch.device("cpu")
AXES = {
    "embed.weight": ("vocab", "embed"),
    "w1.weight": ("ffn", "embed"),
    "w2.weight": ("embed", "ffn"),
    "norm": ("embed",),
}
SHAPES = {"embed.weight": (9, 6), "w1.weight": (8, 6), "w2.weight": (6, 8), "norm": (6,)}
GROUPS = [
    Group(pattern="embed.*", lr_factor=0.25, weight_decay=0.0),
    Group(pattern="*.weight", betas=(0.5, 0.6)),
    Group(pattern="norm", lr_factor=3.0, weight_decay=0.7),
]


def drawn(seed: int) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def built(config: Optimizer.Config, weights: dict[str, nn.Parameter]) -> Any:
    named = [Weight(name, value, AXES[name], Constant(0.0)) for name, value in weights.items()]
    return config.build(weights=named, layout=SingleRank(CPU))


def steps(optimizer: Any, weights: dict[str, nn.Parameter], n: int = 4) -> None:
    """Steps with drawn gradients, of ours or of PyTorch's optimizers."""
    for step in range(n):
        for weight, gradient in zip(weights.values(), drawn(100 + step).values(), strict=True):
            weight.grad = gradient.detach()
        optimizer.step(1.0) if isinstance(optimizer, Optimizer) else optimizer.step()


def test_each_group_is_one_of_pytorch_bit_for_bit() -> None:
    ours, theirs = drawn(0), drawn(0)
    steps(built(AdamW.Config(lr=1e-2, weight_decay=0.1, groups=GROUPS), ours), ours)
    groups = [
        {"params": [theirs["embed.weight"]], "lr": 0.25e-2, "weight_decay": 0.0},
        {"params": [theirs["w1.weight"], theirs["w2.weight"]], "betas": (0.5, 0.6)},
        {"params": [theirs["norm"]], "lr": 3e-2, "weight_decay": 0.7},
    ]
    steps(torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True), theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


def test_muon_and_its_companion_follow_the_same_groups() -> None:
    """A factor on the rate is that of a run with another rate; betas are those of another companion."""
    changed = [Group(pattern="w1.*", lr_factor=0.5), Group(pattern="embed.*", lr_factor=0.5, betas=(0.5, 0.6))]
    grouped, plain = drawn(0), drawn(0)
    companion = AdamW.Config(lr=1e-2)
    steps(built(Muon.Config(lr=1e-2, companion=companion, groups=changed), grouped), grouped)
    halved = replace(companion, lr=0.5e-2, beta1=0.5, beta2=0.6)
    steps(built(Muon.Config(lr=0.5e-2, companion=halved), plain), plain)
    same = {name for name in SHAPES if torch.equal(grouped[name], plain[name])}
    assert same == {"w1.weight", "embed.weight"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            AdamW.Config(groups=[Group(pattern="*.atention.*")]),
            "groups.0.pattern: no weight is called *.atention.*; did",
        ),
        (
            AdamW.Config(groups=[Group(pattern="layers.*"), Group(pattern="layers.1.*")]),
            "groups.1.pattern: every weight called layers.1.* is in an earlier group, layers.*: the first match counts",
        ),
        (AdamW.Config(groups=[Group(pattern="*", frozen=True)]), "groups: all 25 weights are frozen: leave some"),
        (
            Muon.Config(groups=[Group(pattern="layers.*", betas=(0.9, 0.9))]),
            "groups.0.betas: the update of layers.0.attention.wq.weight has no betas",
        ),
    ],
)
def test_groups_that_do_not_fit_the_model(config: Optimizer.Config, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_optimizer(config, meta_model(Toy.Config()))
    assert str(caught.value).startswith(f"optimizer.{message}") and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdamW.Config(groups=[Group(lr_factor=-1.0)]), "groups.0.lr_factor: lr_factor -1.0 must be a finite number"),
        (AdamW.Config(groups=[Group(betas=(0.9, 1.0))]), r"groups.0.betas: betas \(0.9, 1.0\) must be in"),
        (AdamW.Config(groups=[Group(frozen=True, lr_factor=0.1)]), "groups.0.frozen: frozen weights are not updated"),
        (
            Muon.Config(companion=AdamW.Config(groups=[Group()])),
            "companion.groups: the companion follows",
        ),
        (Muon.Config(companion=AdamW.Config(ema_decay=0.9)), "companion.ema_decay: the companion follows"),
    ],
)
def test_groups_that_make_no_sense(config: Optimizer.Config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(config)


def test_a_stage_of_a_pipeline_that_is_frozen_whole_is_refused() -> None:
    run = Trainer.Config(model=Toy.Config(n_layers=4), parallelism=Parallelism(pipeline_parallel_degree=2))
    run.optimizer.groups = [Group(pattern="layers.[0-1].*", frozen=True)]
    check_stages(run, meta_model(run.model))
    run.optimizer.groups.append(Group(pattern="tok_embeddings.*", frozen=True))
    with pytest.raises(UserError, match="all weights of stage 0 of 2 are frozen, and a pipeline needs some to train"):
        check_stages(run, meta_model(run.model))
