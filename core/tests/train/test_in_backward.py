"""Updates in backward: the same bits as after it, without the gradients; what cannot be had is refused."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_run import toy_run, train_until

from core.activation_checkpoint.meter import Meter
from core.checkpoint.settings import Checkpoint
from core.config.errors import UserError
from core.optim.adam import AdamW
from core.optim.groups import Group
from core.optim.muon import Muon
from core.optim.optimizer import Optimizer
from core.optim.sgd import SGD
from core.parallel.layout import RankView, SingleRank
from core.parallel.many_ranks import ManyRanks
from core.parallel.settings import Parallelism
from core.runtime.meta import meta_model
from core.step.checks import check_layout
from core.step.loss import CrossEntropy
from core.step.objective import Objective
from core.step.settings import Debug
from core.step.update import StepInfo, train_step
from core.testing.parity import Case, batches_of, build_case, full
from core.testing.ranks import run_ranks
from core.testing.toy import Toy, ToyMoE
from core.train.memory import estimate
from core.train.trainer import Trainer

CPU = torch.device("cpu")
DENSE, SPARSE = Toy.Config(vocab_size=61, n_layers=3), ToyMoE.Config(vocab_size=61, n_layers=2)
TIED = replace(DENSE, tie_embeddings=True)
GROUPS = [Group(pattern="layers.0.*", frozen=True), Group(pattern="tok_embeddings.*", lr_factor=0.3)]
Found = tuple[list[StepInfo], dict[str, Tensor]]


def trained(case: Case, layout: RankView, **limits: float) -> Found:
    """What three steps say, and the whole weights and states after them."""
    parts = build_case(case, layout)
    settings = {"layout": layout, "dtype": torch.float32, "mask": case.mask}
    objective = Objective(parts.models, CrossEntropy.Config().build(), **settings)
    optimizer: Optimizer = case.optimizer.build(weights=parts.weights(), layout=layout)
    batches, step = batches_of(case, layout), {"max_norm": inf, **limits, "on_nonfinite": "stop"}
    infos = [train_step(objective, optimizer, batches, step=n, lr_factor=1 / n, **step) for n in (1, 2, 3)]
    assert all((weight.grad is None) == case.optimizer.in_backward for _, weight in trained_weights(optimizer))
    after = {name: full(weight.detach()) for name, weight in parts.named_parameters()}
    state = {f"{name}.{key}": full(each) for name, kept in optimizer.state.items() for key, each in kept.items()}
    return infos, after | state


def trained_weights(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    return ((name, weight.parameter) for name, weight in optimizer.weights.items())


def both(case: Case, layout: RankView, **limits: float) -> tuple[Found, Found]:
    """A case with its updates after backward, and in it."""
    early = replace(case, optimizer=replace(case.optimizer, in_backward=True))
    return trained(case, layout, **limits), trained(early, layout, **limits)


def check_same(after: Found, early: Found) -> None:
    assert early[0] == after[0] and after[0][0].loss != after[0][2].loss
    assert early[1].keys() == after[1].keys()
    assert not [name for name, tensor in early[1].items() if not torch.equal(tensor, after[1][name])]


@pytest.mark.parametrize("checkpoint", ["none", "selective", "full"])
@pytest.mark.parametrize("model", [DENSE, TIED, SPARSE], ids=["dense", "tied", "experts"])
def test_one_rank_has_the_same_bits(model: Any, checkpoint: Any) -> None:
    check_same(*both(Case(model, checkpoint=checkpoint), SingleRank(CPU)))


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [
        (Muon.Config(lr=2e-2, groups=GROUPS), torch.float32),
        (AdamW.Config(lr=1e-2, state_dtype="8-bit", ema_decay=0.9), torch.float32),
        (AdamW.Config(lr=1e-2), torch.bfloat16),
    ],
    ids=["muon", "8-bit", "bfloat16"],
)
def test_every_optimizer_has_the_same_bits(optimizer: Any, dtype: torch.dtype) -> None:
    check_same(*both(Case(DENSE, optimizer=optimizer, weights_dtype=dtype), SingleRank(CPU)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limits", [{"max_value": 1e-3}, {"max_norm": 0.1, "fixed_norm": 0.4}], ids=str)
def test_limits_that_are_known_before_have_the_same_bits(limits: dict[str, float], dtype: torch.dtype) -> None:
    """The norm that is told is that before either."""
    case = Case(DENSE, optimizer=SGD.Config(lr=0.5), weights_dtype=dtype)
    found = both(case, SingleRank(CPU), **limits)
    check_same(*found)
    (free, *_), after = trained(case, SingleRank(CPU))
    assert found[1][0][0].grad_norm == free.grad_norm > 2e-3
    assert any(not torch.equal(tensor, after[name]) for name, tensor in found[1][1].items())


LAYOUTS = [
    Case(DENSE, Parallelism(), 2),
    Case(DENSE, Parallelism(tensor_parallel_degree=2), 2, checkpoint="full", weights_dtype=torch.bfloat16),
    Case(SPARSE, Parallelism(data_parallel_replicate_degree=2), 2, checkpoint="selective"),
    Case(SPARSE, Parallelism(expert_parallel_degree=2), 2, checkpoint="full"),
]


def of_layouts() -> list[tuple[Found, Found]]:
    return [both(case, ManyRanks(case.parallelism, CPU)) for case in LAYOUTS]


@pytest.mark.layout
def test_two_ranks_have_the_same_bits() -> None:
    for found in run_ranks(of_layouts, 2, timeout_s=120):
        for pair in found:
            check_same(*pair)


def peak(optimizer: Optimizer.Config) -> tuple[int, int, int]:
    """The most that a third step adds at once, and bytes of all gradients and of the largest."""
    model = Toy.Config(vocab_size=61, n_layers=8, dim=64)
    case = Case(model, checkpoint="full", optimizer=optimizer, n_rows=1, length=8, empty_rows=0)
    layout = SingleRank(CPU)
    parts = build_case(case, layout)
    objective = Objective(
        parts.models, CrossEntropy.Config().build(), layout=layout, dtype=torch.float32, mask=case.mask
    )
    built: Optimizer = optimizer.build(weights=parts.weights(), layout=layout)
    batches, step = batches_of(case, layout), {"max_norm": inf, "on_nonfinite": "stop", "lr_factor": 1.0}
    for number in (1, 2):
        train_step(objective, built, batches, step=number, **step)
    built.zero_grad()
    gc.collect()
    with Meter() as meter:
        train_step(objective, built, batches, step=3, **step)
        most = meter.peak
    sizes = [weight.nbytes for _, weight in trained_weights(built)]
    return most, sum(sizes), max(sizes)


def test_memory_falls_by_the_gradients() -> None:
    """What stays beside activations is at most the gradients of a block, an eighth here, until they are all there."""
    (after, gradients, largest), (early, *_) = peak(AdamW.Config()), peak(AdamW.Config(in_backward=True))
    assert 0.7 * gradients < after - early < gradients - largest
    run = Trainer.Config(model=Toy.Config(n_layers=8, dim=64))
    plain, less = (
        estimate(meta_model(run.model), AdamW.Config(in_backward=early), run.loss, run.training)
        for early in (False, True)
    )
    assert plain.gradients == plain.weights and 0 < less.gradients < plain.gradients / 8
    assert less._replace(gradients=0) == plain._replace(gradients=0)


def test_a_run_is_saved_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Also one that changes its mind: what it learns is the same."""

    def go(name: str, *, early: bool, leaves_at: int = 0) -> dict[str, Tensor]:
        run = toy_run(tmp_path)
        run.dump_folder = str(tmp_path / name)
        run.optimizer.in_backward, run.training.max_norm = early, inf
        run.checkpoint = Checkpoint(enable=True, interval=2)
        trainer = run.build()
        train_until(trainer, leaves_at)
        return {name: weight.detach().clone() for name, weight in trainer.built.named_parameters()}

    expected = go("plain", early=False)
    left = go("early", early=True, leaves_at=2)
    assert not torch.equal(left["output.weight"], expected["output.weight"])
    found = go("early", early=True)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    go("changed", early=True, leaves_at=2)
    found = go("changed", early=False)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def refused(world_size: int = 1, *, optimizer: Optimizer.Config | None = None, debug: Debug | None = None, **more: Any):
    """What is said of a run with updates in backward and these settings of `training` and `parallelism`."""
    run = Trainer.Config(model=Toy.Config(), optimizer=optimizer or AdamW.Config(), debug=debug or Debug())
    run.optimizer.in_backward = True
    run.training.local_batch_size, run.training.max_norm = 4, inf
    for name, value in more.items():
        setattr(run.training if hasattr(run.training, name) else run.parallelism, name, value)
    check_layout(run, world_size)


def test_what_is_not_known_in_backward_is_refused() -> None:
    refused()
    refused(2, max_value=0.1)
    refused(2, max_norm=0.5, fixed_norm=2.0)
    refused(optimizer=Muon.Config())
    for said, settings in {
        "training.max_norm: .* max_norm 1.0 needs the joint norm of all: set .* inf; .*max_value .*fixed_norm": {
            "max_norm": 1.0
        },
        "groups.0.max_norm: .* max_norm 0.5 needs the joint norm of the group": {
            "optimizer": AdamW.Config(groups=[Group(max_norm=0.5)])
        },
        "32 rows in microbatches of 8 add up 4 gradients: set local_batch_size 16, or": {
            "world_size": 2,
            "global_batch_size": 32,
        },
        "pipeline_parallel_degree: .* use pipeline_parallel_degree 1, not 2": {
            "world_size": 2,
            "pipeline_parallel_degree": 2,
        },
        "parallelism.cpu_offload: .* choose one": {"cpu_offload": True},
        "in_backward: the optimizer deals its matrices out to 2 ranks": {"world_size": 2, "optimizer": Muon.Config()},
        "debug.on_spike: .* whether the step is to be left out": {"debug": Debug(on_spike="skip")},
        "debug.on_nonfinite: .* whether the step is to be left out": {"debug": Debug(on_nonfinite="skip")},
    }.items():
        with pytest.raises(UserError, match=said):
            refused(**settings)


def test_a_number_that_is_not_finite_stops_after_the_update() -> None:
    case = Case(DENSE, optimizer=SGD.Config(lr=inf, in_backward=True))
    with pytest.raises(UserError, match="stopped, after the update in backward"):
        trained(case, SingleRank(CPU))
